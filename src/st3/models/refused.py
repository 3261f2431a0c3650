"""The families that cannot be trimmed, or not yet, and why."""

from __future__ import annotations

_CROSS = "its image goes through cross-attention layers: the text has no visual tokens"
_ENCODER_DECODER = "it is an encoder-decoder: the decoder sees no visual tokens"
_NO_PLACEHOLDER = "its image has no placeholder tokens that say which tokens are visual"
_QUERIES = "a Q-Former already reduces an image to 32 tokens"
_SHARED = "its last layers read KV entries shared with earlier ones, which trimming makes uneven"
_STATE = "its linear attention layers hold a state of all tokens, and no KV entries to trim"
_INDEX = "an index of its own chooses which keys a query sees, by their place in the whole sequence"
REFUSED: dict[str, str] = {
    "mllama": _CROSS,
    "idefics": _CROSS,
    "blip": _CROSS,
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "kosmos-2": _NO_PLACEHOLDER,
    "kosmos-2.5": _NO_PLACEHOLDER,
    "git": _NO_PLACEHOLDER,
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "gemma3n": _SHARED,
    "glm5_next": _STATE,
    "granite4_vision": "it adds image features between late layers (deepstack), in its own loop",
    "mistral_large4": _INDEX,
    "minimax_m3_vl": _INDEX,
    "unlimited_ocr": "its cache layers hold a sliding window over the answer",
    "diffusion_gemma": "it generates by diffusion, not token by token",
}
