"""What every metric and figure means and which direction is good: the one table, for a run's page and for docs/metrics.md.

A test compares it with the names that are logged. `python docs/generate.py` writes it into docs/metrics.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    text: str
    good: str = ""
    """The direction that is good, or what to compare it with."""


MEANINGS = {
    "train/loss": Meaning(
        "nats per token of this step's batch, summed over ranks and divided once; in SFT, per token that the assistant wrote; in a reward "
        "model, per pair or rating; in RL, the clipped objective, which stays near 0 by construction: look at `reward/` and `rollout/kl_` "
        "instead",
        "lower",
    ),
    "train/centering": Meaning(
        "in a reward model, the squared sum of a pair's two scores, per pair or rating; weighted by `centering_coef`, and not part of "
        "`train/loss`",
        "small",
    ),
    "train/lr": Meaning("learning rate of this step", "as the schedule says"),
    "train/grad_norm": Meaning("global norm of the gradient before clipping", "steady"),
    "train/tokens_per_s": Meaning(
        "tokens trained on per second, over all ranks; in SFT, those that the assistant wrote; in a reward model, prompts and responses "
        "without padding",
        "higher",
    ),
    "time/step_s": Meaning("seconds per optimizer step", "lower"),
    "time/stage_s": Meaning("seconds for a whole stage; for a reused stage, of the run that made its output", "lower"),
    "val/loss": Meaning(
        "nats per token of a fixed part of the held-out tokens, seen in windows; in SFT, per token that the assistant wrote in held-out "
        "conversations; in a reward model, per held-out pair or rating",
        "lower",
    ),
    "eval/loss": Meaning("nats per held-out token, each scored once with at least half a window of context", "lower"),
    "eval/bits_per_byte": Meaning(
        "bits per byte of held-out text, including the cost of ending documents: comparable between tokenizers", "lower"
    ),
    "eval/xz_bits_per_byte": Meaning("bits per byte that `xz -9e` needs for the held-out text", "to be beaten"),
    "eval/ppmd_bits_per_byte": Meaning(
        "bits per byte that PPMd (order 6) needs for the held-out text after reading the training text", "hard to beat for a small model"
    ),
    "eval/pair_accuracy": Meaning(
        "share of held-out pairs whose chosen response has the higher score, a tie counting half; if records have a field `kind`, also for "
        "each pair kind, as `eval/pair_accuracy_KIND`",
        "higher; 0.5 is chance",
    ),
    "eval/rating_auc": Meaning(
        "probability that a held-out response rated 0.5 or more has a higher score than one rated lower", "higher; 0.5 is chance"
    ),
    "eval/exactly_right": Meaning(
        "share of held-out questions whose most likely answer equals the right one to the letter; questions whose right answer is the "
        "refusal don't count",
        "higher",
    ),
    "eval/exactly_right_sampled": Meaning("the same for an answer sampled at temperature 1", "higher"),
    "eval/number_right": Meaning(
        "share of held-out questions with a number in the right answer whose most likely answer has that number behind `number_marker`; an "
        "answer that was cut off is wrong",
        "higher",
    ),
    "eval/number_right_sampled": Meaning("the same for an answer sampled at temperature 1, as RL's verifier would judge it", "higher"),
    "eval/declined": Meaning("share of the questions whose right answer is the refusal that are declined", "higher"),
    "eval/false_refusals": Meaning("share of the other questions that are declined", "lower"),
    "eval/response_tokens": Meaning("mean tokens per answer, including its end", "as the questions ask"),
    "eval/too_long_share": Meaning(
        "share of the questions that were not asked because they leave no room for an answer; logged if above 0", "lower"
    ),
    "eval/truncated_share": Meaning("share of the most likely answers that were cut off", "lower"),
    "eval/score_mean": Meaning(
        "mean score that the reward model gives sampled answers, in standard deviations of its own training items' scores", "higher"
    ),
    "eval/score_std": Meaning("standard deviation of those scores"),
    "eval/score_gain_in_deviations": Meaning(
        "how much higher `score_mean` is than the baseline's, in standard deviations of the baseline's scores", "higher"
    ),
    "eval/kl_nats_per_response": Meaning(
        "log(model/baseline) of the model's own sampled answers, summed over a response", "small for what was gained"
    ),
    "reward/score_mean": Meaning("mean score of the step's responses, including `missing_end_score`", "higher"),
    "reward/score_std": Meaning("standard deviation of those scores"),
    "reward/total_mean": Meaning("mean score minus the KL penalty", "higher"),
    "rollout/kl_k1_nats_per_response": Meaning(
        "log(policy/reference) of the step's responses, summed over a response", "grows slowly, never clearly negative"
    ),
    "rollout/kl_k3_nats_per_token": Meaning("the same divergence per token, with less noise", "small"),
    "rollout/response_tokens": Meaning("mean tokens per response, including its end", "steady"),
    "rollout/truncated_share": Meaning("share of responses that were cut off", "lower"),
    "rollout/failed_share": Meaning("share of responses that a scorer could not judge", "0"),
    "rollout/logprob_mismatch": Meaning("mean absolute difference between the training engine's and the sampler's logprobs", "below 0.005"),
    "rollout/tokens_per_s": Meaning("response tokens sampled and scored per second", "higher"),
    "train/value_loss": Meaning("half the squared error of the value model", "lower"),
    "train/clip_fraction": Meaning("share of tokens whose ratio left the clip range", "0.05 to 0.3 with several updates a step"),
    "train/approx_kl": Meaning("divergence from the policy at the step's start", "small"),
    "train/entropy": Meaning("entropy, in nats per token", "not to 0"),
    "train/ratio_first": Meaning("mean absolute difference of the first update's ratios from 1", "exactly 0"),
    "train/explained_variance": Meaning("share of the returns' variance that the values predicted", "towards 1"),
    "train/value_grad_norm": Meaning("like `train/grad_norm`, for the value model", "steady"),
    "time/rollout_s": Meaning("seconds of a step for sampling and scoring responses", "lower"),
    "time/update_s": Meaning("seconds of a step for updating the models", "lower"),
}
"""Metric or figure to its meaning, in the order in which tables show them."""
EVALUATED_BESIDE = {"eval/baseline_": "baseline", "eval/best_of_": "best of several samples"}
"""Prefixes under which an evaluation logs the figures of another model's answers, and the heading of their column."""
PAIR_KIND = "eval/pair_accuracy_"


def meaning(figure: str) -> str:
    """A sentence about a figure; empty for one that we don't know, such as a user's own."""
    if figure.startswith(PAIR_KIND):
        return f"The same for pairs of kind {figure.removeprefix(PAIR_KIND)} only."
    if figure not in MEANINGS:
        return ""
    text, good = MEANINGS[figure]
    return f"{text[0].upper()}{text[1:]}." + (f" Good: {good}." if good else "")


def order(figure: str) -> tuple[int, bool]:
    """Sorts figures as in `MEANINGS`, pair kinds after all pairs and unknown ones last."""
    is_pair_kind = figure.startswith(PAIR_KIND)
    name = PAIR_KIND.removesuffix("_") if is_pair_kind else figure
    known = list(MEANINGS)
    return known.index(name) if name in known else len(known), is_pair_kind


def markdown_table() -> str:
    """The table of docs/metrics.md."""
    rows = [(f"`{name}`", *each) for name, each in MEANINGS.items()]
    at = next(number for number, (name, *_) in enumerate(rows) if name.startswith("`reward/"))
    rows[at:at] = [
        (
            "`eval/best_of_NAME`",
            "like `eval/NAME`, for the answer that the reward model prefers among several samples",
            "what RL has to beat",
        ),
        ("`eval/baseline_NAME`", "like `eval/NAME`, for the model that this one is compared with", "to be beaten"),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in (("name", "what it is", "good is"), ("---", "---", "---"), *rows))
