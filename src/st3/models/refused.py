"""The families that cannot be trimmed, or not yet, and why."""

from __future__ import annotations

_CROSS = "its image goes through cross-attention layers: the text has no visual tokens"
_ENCODER_DECODER = "it is an encoder-decoder: the decoder sees no visual tokens"
_NO_PLACEHOLDER = "its image has no placeholder tokens that say which tokens are visual"
_QUERIES = "a Q-Former already reduces an image to 32 tokens"
_BOTH = (
    "its keys go through a convolution, whose state lies with the KV entries in one layer of the "
    "cache, and its attention goes by the distance of columns"
)
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
    "glm5_next": "its index pools keys in fours and counts them by a cache layer's length, which "
    "says how long the text is, trimmed or not",
    "qwen4_exp": "its index asks for the rotary table of each column of the cache, also of those "
    "before a pass",
    "inkling2": _BOTH,
    "inkling2_loop": _BOTH,
    "inkling_mm_model": _BOTH,
    "gemma4_assistant": "it drafts tokens for Gemma 4, whose KV entries it reads: it sees no image",
    "unlimited_ocr": "its cache layers hold the whole prompt and a sliding window over the answer, "
    "which st3's do not",
    "dots3_note": "some of its layers have an index, others a sliding window, whose cache does not "
    "keep every column",
    "diffusion_gemma": "it generates by diffusion, not token by token",
}
