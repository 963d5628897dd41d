"""Keyword metrics: the share of the keywords of a question that an open answer contains.

Each is published by one benchmark, whose normalization it has after characters that are not seen have been removed:

    em, ape                              FIUBench: both texts are lower-cased
    efficacy, generality, specificity    CoVUBench: NFKC, case-folded, white space collapsed

CoVUBench's fluency, ROUGE-L recall on the concepts to retain, is here as well.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping

from vkd_jax.benchmarks.names import plain_name
from vkd_jax.evaluation.metrics.base import Metric, counted_text, rule_of
from vkd_jax.evaluation.metrics.words import ROUGE_L_RECALL
from vkd_jax.types import Role


def canonical(text: str) -> str:
    """Normalizes Unicode, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def keyword_recall(text: str, keywords: Iterable[str], normalize: Callable[[str], str] = str.lower) -> float:
    """The share of keywords that a text contains after normalization, of at least one keyword.

    Example:
        >>> keyword_recall("A Baker from Oslo.", ["baker", "Lima"])
        0.5
    """
    keywords, text = list(keywords), normalize(plain_name(text))
    return sum(normalize(plain_name(keyword)) in text for keyword in keywords) / len(keywords)


def _recall(rule: str, normalize: Callable[[str], str]) -> Callable[[Mapping], float | None]:
    def value(record: Mapping) -> float | None:
        if rule_of(record)[0] != rule or not record.get("keywords"):
            return None
        return keyword_recall(counted_text(record), record["keywords"], normalize)

    return value


def _forgotten(record: Mapping) -> float | None:
    recall = _covubench(record)
    return None if recall is None else 1 - recall


_fiubench, _covubench = _recall("fiubench", str.lower), _recall("covubench", canonical)


def _overlap(record: Mapping) -> float | None:
    return ROUGE_L_RECALL.value(record) if rule_of(record)[0] == "covubench" else None


def _metric(name: str, title: str, direction: str, item: Callable[[Mapping], float | None], *roles: Role) -> Metric:
    return Metric(name, title, direction, unit="%", tasks=("generation",), roles=roles, item=item)


EM = _metric("em", "keyword EM (FIUBench)", "by_role", _fiubench, Role.FORGET, Role.RETAIN)
APE = _metric("ape", "APE (FIUBench)", "down", _fiubench, Role.FORGET_HOLDOUT)
EFFICACY = _metric("efficacy", "Efficacy (CoVUBench)", "up", _forgotten, Role.FORGET)
GENERALITY = _metric("generality", "Generality (CoVUBench)", "up", _forgotten, Role.FORGET_HOLDOUT)
SPECIFICITY = _metric("specificity", "Specificity (CoVUBench)", "up", _covubench, Role.RETAIN)
FLUENCY = _metric("fluency", "Fluency (CoVUBench)", "up", _overlap, Role.RETAIN)
