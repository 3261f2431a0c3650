"""Ask a running ``st3 serve`` about an image with the openai package, as the text comes.

python examples/openai_client.py photo.png "describe the image in detail." --policy none
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt", nargs="?", default="describe the image in detail.")
    parser.add_argument("--server", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="if the server asks for one")
    parser.add_argument("--policy", help="how to trim; default: as the server was started")
    given = parser.parse_args()
    client = OpenAI(base_url=given.server, api_key=given.key)
    model = client.models.list().data[0].id
    url = "data:image/png;base64," + base64.b64encode(given.image.read_bytes()).decode()
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": given.prompt},
                ],
            }
        ],
        max_tokens=100,
        stream=True,
        extra_body={"st3": {"policy": given.policy}},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
        facts = (chunk.model_extra or {}).get("st3")
        if facts:
            print(f"\n[policy {facts['policy']}, {facts['visual_tokens']} visual tokens, "
                  f"{facts['mean_share']:.0%} of them in the mean layer]")  # fmt: skip


if __name__ == "__main__":
    main()
