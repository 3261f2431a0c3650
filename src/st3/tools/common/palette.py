"""One colour and one marker per policy, the same in every picture of st3.

Colours after Okabe & Ito (2008) and Paul Tol's "muted" and "vibrant" schemes, which people with any
colour vision tell apart in small groups; no set of this size is safe by colour alone, so every
policy has a marker as well.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

PAPER, INK, LINES = "#fcfcf9", "#1a1a1a", "#b8b8b8"  # ground, text, axes and help lines

_LOOKS: dict[str, tuple[str, str]] = {
    "untrimmed": ("#4d4d4d", "o"),
    "thirds": ("#0072b2", "D"),
    "balanced": ("#8c510a", "o"),
    "st3": ("#5e3c99", "D"),
    "fastv": ("#e69f00", "v"),
    "vtw": ("#009e73", "*"),
    "pyramiddrop": ("#d55e00", "P"),
    "random": ("#cc79a7", "^"),
    "uniform": ("#999933", "s"),
    "sparsevlm": ("#56b4e9", "<"),
    "dart": ("#882255", ">"),
    "v2drop": ("#44aa99", "p"),
    "feather": ("#332288", "h"),
    "divprune": ("#117733", "d"),
    "cdpruner": ("#aa4499", "8"),
    "visionzip": ("#b2182b", "X"),
    "key_norm": ("#7a7a00", "H"),
    "dycoke": ("#6b7a1e", "o"),
    "downsample": ("#555511", "H"),
    "hiprune": ("#cc6677", "p"),
    "vispruner": ("#ee7733", "8"),
    "vscan": ("#a6761d", "<"),
    "transprune": ("#004488", ">"),
    "evict": ("#882255", "s"),
    "covered": ("#7b3294", "*"),
    "scope": ("#66ccee", "P"),
    "mmr": ("#ee6677", "h"),
    # Rows of st3 bench beside the policies.
    "untrimmed, st3's cache": ("#9a9a9a", "s"),
    "attached, drops nothing": ("#8c510a", "X"),
    "fastv (authors' way)": ("#ddaa33", "v"),
}
_ALIASES = {"none": "untrimmed", "untouched": "untrimmed", "grid": "uniform", "keynorm": "key_norm"}
# For what is not named above, and for several variants of one policy in the same picture.
_SPARE = (
    ("#01665e", "s"), ("#cc6677", "v"), ("#ddaa33", "^"), ("#4477aa", "P"),
    ("#66ccee", "X"), ("#228833", "p"), ("#ee6677", "h"), ("#bb5566", "<"), ("#004488", ">"),
)  # fmt: skip


def look(policy: str) -> tuple[str, str]:
    """Colour (``#rrggbb``) and matplotlib marker of a policy, given as its name or as a whole
    policy string: ``st3:stride=2`` looks like ``st3``. A name that is not known here gets one of
    the spare looks, always the same."""
    name = policy.partition(":")[0].strip().lower().replace("-", "_")
    name = _ALIASES.get(name, name)
    if name in _LOOKS:
        return _LOOKS[name]
    return _SPARE[zlib.crc32(name.encode()) % len(_SPARE)]


def color(policy: str) -> str:
    """The colour of a policy, ``#rrggbb``; see :func:`look`."""
    return look(policy)[0]


def marker(policy: str) -> str:
    """The matplotlib marker of a policy; see :func:`look`."""
    return look(policy)[1]


def looks(policies: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Looks for all of a picture's policies. The first of each name takes that name's look, further
    variants (``st3:stride=2`` beside ``st3:stride=4``) the spare ones in order."""
    spare = iter(_SPARE * (1 + len(policies)))
    chosen: dict[str, tuple[str, str]] = {}
    for policy in sorted(policies, key=lambda p: ":" in p):  # a plain name before its variants
        own = look(policy)
        if own in chosen.values():
            own = next(s for s in spare if s not in chosen.values() or len(chosen) >= len(_SPARE))
        chosen[policy] = own
    return {policy: chosen[policy] for policy in policies}
