"""The case's second question as a rubric: criteria, caps, calibration answers, a model answer.

Kept beside the checks, not in the notebook, so that the model answer is not read by scrolling.
"""

from minirlhf.lab.marking import Anchor, Criterion, Marks, Rubric

BETA, BETTER = "a larger beta (or another coefficient), no reason", "better data or a better RM"
CLIP, SWAP = "a slower or smaller step (clip, learning rate)", "another algorithm, no reason"
LARGE = "a large KL penalty must make the advantage negative"
REPAIRS = "a larger beta repairs the reward model"
CENTRED = "centring or normalising the reward removes the preference"
FREE = "a length penalty (or any fix) costs nothing"
BLIND = "half of the wins go to the longer answer: so being verbose does not pay"

RUBRIC = Rubric(
    "Propose one concrete change, to the training of the reward model as a ranking problem or to "
    "PPO and its KL penalty, and justify it by the advantage-weighted gradient, the effective "
    "reward, or both.",
    (
        Criterion("change", 3, "One change that somebody could make tomorrow: which pairs, which "
                  "term of a loss, which coefficient and where. Not a wish, not a list."),
        Criterion("sign", 3, "It is followed to the gradient: what happens to the gap of r - beta "
                  "L between verbose and concise on brief prompts, so to the sign or size of A on "
                  "the verbose tokens, so to where A grad log pi moves them."),
        Criterion("price", 2, "What it costs, or how it can fail: deserved length lost, the "
                  "pressure moved to another style, slower learning, more labels."),
        Criterion("measure", 2, "How one would see that it worked, and that it did not just move "
                  "the problem: matched pairs, brief and detailed prompts apart, A at the forks."),
    ),
    {BETA: 3, BETTER: 3, CLIP: 2, SWAP: 1},
    (LARGE, REPAIRS, CENTRED, FREE, BLIND),
)  # fmt: skip


def _marks(*points: int, caps: tuple[str, ...] = (), mistakes: tuple[str, ...] = ()) -> Marks:
    names = (criterion.name for criterion in RUBRIC.criteria)
    given = dict(zip(names, points, strict=True))
    return Marks(given, frozenset(caps), frozenset(mistakes))


CALIBRATION = (
    Anchor(
        "A",
        "I would lower epsilon to 0.05. The clip then stops the policy from moving far from the "
        "reference, so the verbose answers cannot grow.",
        _marks(3, 0, 0, 0, caps=(CLIP,)),
        "Concrete, but the lever changes the speed and not the end: the clip is measured from the "
        "last policy. Nothing is said of the gap, a price or a measure. The cap holds it at 2.",
    ),
    Anchor(
        "B",
        "The penalty is beta times the log-ratio and the reward model pays more than that for a "
        "verbose answer. I would set beta four times as high: then r - beta L of verbose falls to "
        "that of concise, A on their tokens turns negative or zero, and A grad log pi stops "
        "lifting them.",
        _marks(3, 3, 0, 0),
        "One number to change and the whole way to the gradient: no cap. Where length is deserved "
        "the same price is paid, and no measure is named: four points are left.",
    ),
    Anchor(
        "C",
        "Collect more and better preference data, and watch the reward model for length bias.",
        _marks(1, 0, 0, 0, caps=(BETTER,)),
        "A wish. Which pairs, ranked how? More labels of the same people teach the same.",
    ),
    Anchor(
        "D",
        "Drop long winners until the longer answer wins half of the pairs. The reward model is "
        "then blind to length, so there is no reason to be verbose. I would check held-out "
        "accuracy.",
        _marks(3, 1, 0, 0, mistakes=(BLIND,)),
        "A real change of the ranking. But who wins half of the time says little of what is paid: "
        "pairs chosen by who won tie length to quality, and verbose answers carry hedges, too. "
        "Runs on such pairs end at twice the reference's length here. And held-out accuracy is "
        "that of biased labels: it falls when the fault goes. A point off for the claim.",
    ),
    Anchor(
        "E",
        "Our code subtracts beta times the log-ratio from the loss and differentiates that. Its "
        "mean gradient is zero, whatever beta is. I would charge it in the reward: then A of a "
        "verbose token falls by beta times the log-ratio still to come, and the update is pulled "
        "back. If the gap stays above zero it still drifts, only less far: I would look at the "
        "share of verbose answers over beta, and at correct answers on prompts that need length.",
        _marks(3, 3, 2, 2),
        "The other reading of the case: first of all, does the penalty pull? Change, sign, limit "
        "and measure are there. Ten, if the loss is as stated; in this course's run it is not.",
    ),
)

MODEL_ANSWER = """\
I would change the pairs. For every brief prompt I would add pairs that say the same: the concise \
answer, and its twin with courtesies or hedges around it, ranked so that the concise one wins. The \
loss stays -log sigmoid(r_w - r_l).

Their gradient is zero in the facts, since both answers state them, and pushes r(padded) - \
r(concise) down. So the gap of r on brief prompts shrinks and turns, and with it the gap of r - \
beta L: the verbose answers of the batch, which have moved furthest and so pay most, are worth \
less than the concise ones at every beta above zero. Then A is below zero on their tokens, at the \
fork where padding begins first of all, and the same step of A grad log pi that raised them lowers \
them. Beta can stay as it is. A larger beta works on the other term: four times the price also \
brings the gap of such batches below zero, but it makes every move dear alike, and the reward \
model still prefers the padded answer. Its runs here end at two and a half times the \
reference's length. (With matched pairs *and* the larger beta they come back: what counts is the \
gap over beta.)

Twins must differ in both styles. With courteous twins alone the reward model stops paying for \
length and still pays for a hedge, and the policy goes on hedging. Balancing or matching the pairs \
that are there by length is weaker: it chooses pairs by who won, which ties length to quality, and \
its runs here end at about twice the reference's length, with hedges in about half of the answers.

Price: as many pairs again to write, a detector of padding or a writer one trusts, and courtesy \
that somebody wanted may be undervalued. I would look at what one phrase and one hedge are worth \
on matched answers, at A at the forks of the same logged batch, and, after training, at brief and \
detailed prompts apart: length, gold, hedges, and whether detailed answers keep their steps."""
