"""CIDEr-D, BLEU-4 and ROUGE-L of descriptions against their references.

Own implementations: the reference one (pycocoevalcap 1.2) is a wheel of 104 MB that was last
released in 2020, carries no licence and needs Java to split words. The formulas are its own; the
tests compare with its values. Words are split by a regular expression here, punctuation left out,
in place of the Penn Treebank tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, tensor

ORDER = 4  # n-grams of 1 to 4 words, in CIDEr-D and in BLEU
SIGMA = 6.0  # of CIDEr-D's penalty on a difference in length
BETA = 1.2  # weight of the recall in ROUGE-L

Grams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _grams(text: Sequence[str]) -> Grams:
    return Counter(
        tuple(text[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(text) - n + 1)
    )


def cider_d(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each text, 0..10 (tables often show it times 10).

    How rare an n-gram is, is counted in the references given: scores of different sets, or of
    parts of a set, cannot be compared, and with a single image all are 0.

    Source: Vedantam et al., arXiv 1411.5726, section 6; n-grams of up to 4 words, sigma 6.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    cooked = [[_grams(words(text)) for text in group] for group in references]
    for group in cooked:
        seen.update({gram for grams in group for gram in grams})
    total = math.log(max(len(references), 1))

    def vector(grams: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDER)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (total - math.log(max(1, seen[gram])))
        norms = [math.sqrt(sum(v * v for v in part.values())) for part in parts]
        return parts, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    scores = []
    for text, group in zip(texts, cooked, strict=True):
        own, own_norms, own_length = vector(_grams(words(text)))
        score = 0.0
        for reference in group:
            other, norms, length = vector(reference)
            penalty = math.exp(-((own_length - length) ** 2) / (2 * SIGMA**2))
            for n in range(ORDER):
                if own_norms[n] and norms[n]:
                    dot = sum(
                        min(value, other[n][gram]) * other[n][gram]
                        for gram, value in own[n].items()
                        if gram in other[n]
                    )
                    score += penalty * dot / (own_norms[n] * norms[n])
        scores.append(10 * score / (ORDER * len(group)))
    return scores


def bleu_counts(text: str, references: Sequence[str]) -> Tensor:
    """What BLEU-4 is made of, of one text. Summed over texts and given to :func:`bleu4`.

    Args:
        text: what was answered.
        references: one or more.

    Returns:
        [10]: matches by order, n-grams by order (1 to 4 words), the text's length, and the length
        of the closest reference.
    """
    own, others = words(text), [words(reference) for reference in references]
    most: Grams = Counter()
    for other in others:
        most |= _grams(other)
    grams = _grams(own)
    matches, totals = [0.0] * ORDER, [0.0] * ORDER
    for gram, count in grams.items():
        totals[len(gram) - 1] += count
        matches[len(gram) - 1] += min(count, most[gram])
    closest = min((abs(len(other) - len(own)), len(other)) for other in others)[1]
    return tensor([*matches, *totals, len(own), closest])


def bleu4(counts: Tensor) -> Tensor:
    """Corpus BLEU-4, 0..1, from summed counts [..., 10]; 0 where an order has no match.

    Source: Papineni et al. 2002; brevity against the closest reference, as in pycocoevalcap.
    """
    matches, totals = counts[..., :ORDER], counts[..., ORDER : 2 * ORDER]
    own, other = counts[..., -2], counts[..., -1]
    precision = (matches / totals.clamp(min=1)).log().mean(-1).exp()  # log 0 = -inf, exp gives 0
    return precision * (1 - other / own.clamp(min=1)).clamp(max=0).exp()


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L of one text, 0..1: the longest common subsequence's F-measure with beta 1.2, best
    precision and best recall over the references.

    Source: Lin 2004; the choice over references as in pycocoevalcap.
    """
    own = words(text)
    others = [words(reference) for reference in references]
    common = [_longest_common(own, other) for other in others]
    precision = max((n / len(own) for n in common), default=0.0) if own else 0.0
    recall = max((n / len(o) for n, o in zip(common, others, strict=True) if o), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second):
            diagonal, best[j + 1] = (
                best[j + 1],
                diagonal + 1 if word == other else max(best[j], best[j + 1]),
            )
    return best[-1]


def mentioned(text: str, vocabulary: dict[str, str]) -> list[str]:
    """The objects of ``vocabulary`` (phrase -> name) in a text, in order of first mention, each
    once; of phrases that begin at the same word the longest counts.

    Source: the way of CHAIR (arXiv 1809.02156), with the set's own list of objects and synonyms.
    """
    phrases = {tuple(words(phrase)): name for phrase, name in vocabulary.items()}
    longest = max(map(len, phrases), default=0)
    own, found = words(text), []
    at = 0
    while at < len(own):
        for length in range(min(longest, len(own) - at), 0, -1):
            name = phrases.get(tuple(own[at : at + length]))
            if name is not None:
                found.append(name)
                at += length - 1
                break
        at += 1
    return list(dict.fromkeys(found))


_SMALL = re.compile(r"\b(a|an|the)\b")


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the accepted ones: case, punctuation and articles do not count,
    all other words do.

    Args:
        text: what was answered.
        answers: the accepted ones; none: never right.
    """

    def plain(answer: str) -> list[str]:
        return words(_SMALL.sub(" ", answer.lower())) or words(answer)

    return any(plain(text) == plain(answer) for answer in answers)
