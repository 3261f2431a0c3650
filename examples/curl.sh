#!/usr/bin/env bash
# Ask a running `st3 serve` about an image, and print the answer's events as they come:
#   examples/curl.sh photo.png "describe the image in detail." [SERVER] [MODEL] [KEY]
set -euo pipefail
image=$1
prompt=${2:-describe the image in detail.}
server=${3:-http://127.0.0.1:8000}
model=${4:-st3-tiny}
key=${5:-none}

# The body goes through a pipe: an image is too long for an argument.
python3 -c '
import base64, json, sys
model, prompt, image = sys.argv[1:]
url = "data:image/png;base64," + base64.b64encode(open(image, "rb").read()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
turn = {"role": "user", "content": parts}
print(json.dumps({"model": model, "messages": [turn], "max_tokens": 100, "stream": True}))
' "$model" "$prompt" "$image" |
  curl -sN "$server/v1/chat/completions" -H "Content-Type: application/json" \
    -H "Authorization: Bearer $key" -d @-
