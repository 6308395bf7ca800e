"""The rules, each with a code that stays; `docs/rules/` has a page for each.

JR001 to JR008 say whether figures are good and can be trusted, JR009 and on whether the model is
what it claims to be, and what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What a gate asks.

    Attributes:
        code: `JR001`.
        name: in a word or two, `clean-drop`.
        meaning: what is wrong where it is broken.
        remedy: what to do then.
    """

    code: str
    name: str
    meaning: str
    remedy: str

    @property
    def page(self) -> str:
        """Where more is said, in the repository."""
        return f"docs/rules/{self.code}.md"


_ALL = (
    Rule(
        "JR001",
        "clean-drop",
        "The jumps may cost more clean accuracy than allowed: the upper end of the 95% interval of "
        "the drop is above gates.max_clean_accuracy_drop.",
        "Use smaller jumps, or more examples, which narrow the interval.",
    ),
    Rule(
        "JR002",
        "robust-floor",
        "The worst case over all attacks may be below the floor: the lower end of its 95% interval "
        "is below gates.min_robust_accuracy.",
        "Use another model or a smaller epsilon, or more examples, which narrow the interval.",
    ),
    Rule(
        "JR003",
        "no-gain",
        "No gain is shown against attackers who know of the jumps: the lower end of the 95% "
        "interval of the change in the worst case is not above gates.min_adaptive_gain.",
        "Use other jumps, or none; or allow a loss, with a negative gates.min_adaptive_gain.",
    ),
    Rule(
        "JR004",
        "masking-suspected",
        "The model hides its gradient without being harder to fool: an attack that does not follow "
        "the gradient, or follows another slope, breaks what the plain attack left.",
        "Quote the worst case alone. No high score waives this rule.",
    ),
    Rule(
        "JR005",
        "attack-invalid",
        "An attack does not do what an attack must, so that what it left says nothing.",
        "Find out why the attack fails. Until then the result is neither a pass nor a fail.",
    ),
    Rule(
        "JR006",
        "input-contract",
        "The data does not look like what the model was made for.",
        "Repair the labels, the scale or the layout of the data.",
    ),
    Rule(
        "JR007",
        "parity",
        "A fresh session of the model classifies correctly what the attack counted as broken.",
        "Report it with both files: what is counted is not what is deployed.",
    ),
    Rule(
        "JR008",
        "gradient-health",
        "Gradients are zero or not finite, so that attacks on them say nothing.",
        "Attack another loss, a surrogate slope, or without gradients.",
    ),
    Rule(
        "JR009",
        "not-equivalent",
        "The hardened model is not the original with jumps at its sites and nothing else changed.",
        "Retrofit the original again, or find out who changed the file.",
    ),
    Rule(
        "JR010",
        "site-left-out",
        "A site of the original has no jump.",
        "Retrofit all sites, or set gates.all_sites_retrofitted to false.",
    ),
    Rule(
        "JR011",
        "too-slow",
        "The hardened model takes longer than gates.max_latency_ratio times the original.",
        "Use a cheaper form, say --target onnxruntime, or fewer sites.",
    ),
    Rule(
        "JR012",
        "opset",
        "The model's opset is outside gates.min_opset and gates.max_opset.",
        "Export the original again with another opset, and retrofit that.",
    ),
    Rule(
        "JR013",
        "too-large",
        "The model, with its external data, is larger than gates.max_size or max_size_ratio allow.",
        "Look at what grew: a form that shares its constants adds some hundred bytes a site.",
    ),
    Rule(
        "JR014",
        "regression",
        "Clean or robust accuracy fell below that of the baseline by more than the tolerance.",
        "Find out what changed, or write a new baseline with jr-onnx gate --json.",
    ),
)
RULES = {rule.code: rule for rule in _ALL}
