"""Which metrics and labels a PromQL query refers to, checked against a catalogue of metrics with their labels."""

from collections.abc import Mapping

import promql_parser as promql

TARGET = {"instance", "job"}
"""Labels that Prometheus adds to each sample of a target."""
Catalogue = Mapping[str, set[str]]


class Unknown(AssertionError):
    """A metric or a label that there isn't."""


def labels_of(query: str, catalogue: Catalogue) -> set[str]:
    """Labels that the answer's series may have. Raises Unknown, and ValueError for what is no PromQL."""
    return _labels(promql.parse(query), catalogue)


def metrics_of(query: str) -> set[str]:
    """Names of the metrics that it reads."""
    found: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.add(node.name)

    promql.walk(promql.parse(query), visit)
    return found


def _demand(names: set[str], there: set[str], where: str) -> None:
    if missing := names - there:
        raise Unknown(f"{where} has no label {', '.join(sorted(missing))}: it has {', '.join(sorted(there))}")


def _selected(node: promql.VectorSelector, catalogue: Catalogue) -> set[str]:
    if node.name not in catalogue:
        raise Unknown(f"there is no metric {node.name}")
    there = catalogue[node.name] | TARGET
    _demand({matcher.name for matcher in node.matchers.matchers}, there, node.name)
    return there


def _labels(node: promql.Expr, catalogue: Catalogue) -> set[str]:
    match node:
        case promql.VectorSelector():
            return _selected(node, catalogue)
        case promql.MatrixSelector():
            return _labels(node.vector_selector, catalogue)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, catalogue)
        case promql.Call():
            there = set().union(*(_labels(each, catalogue) for each in node.args))
            return there - {"le"} if node.func.name == "histogram_quantile" else there
        case promql.AggregateExpr():
            return _aggregated(node, _labels(node.expr, catalogue))
        case promql.BinaryExpr():
            return _joined(node, _labels(node.lhs, catalogue), _labels(node.rhs, catalogue))
        case promql.NumberLiteral() | promql.StringLiteral():
            return set()
    raise TypeError(f"not known here: {type(node).__name__}")


def _aggregated(node: promql.AggregateExpr, there: set[str]) -> set[str]:
    if node.modifier is None:
        return set()
    named = set(node.modifier.labels)
    _demand(named, there, node.expr.prettify())
    return named if node.modifier.type == promql.AggModifierType.By else there - named


def _joined(node: promql.BinaryExpr, left: set[str], right: set[str]) -> set[str]:
    """Both sides must have the labels that they are matched by; without ``on`` all of them."""
    if not left or not right:
        return left | right
    matching = node.modifier.matching if node.modifier is not None else None
    if matching is None:
        _demand(left ^ right, left & right, node.prettify())
        return left
    named = set(matching.labels)
    if matching.type == promql.LabelModifierType.Include:
        _demand(named, left & right, node.prettify())
    return left
