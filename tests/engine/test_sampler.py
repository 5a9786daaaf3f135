"""The sampler against slow references, and the promise that a row's token is its own affair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.base.errors import BadRequest
from baton.base.messages import Grammar, Sampling
from baton.engine.grammar import NoGrammars
from baton.engine.sampler import NUCLEUS_FIRST, NUCLEUS_NEXT, Sampler, invert_cumulative, uniform
from baton.engine.sequence import Sequence

VOCAB = 12
EOS = 3


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, [EOS], NoGrammars())


def sequence(sampling: Sampling, prompt: Seq[int] = (1, 2), output: Seq[int] = (), id: str = "s") -> Sequence:
    return Sequence(id, [*prompt, *output], len(prompt), sampling)


def draw(logits: torch.Tensor, *sequences: Sequence) -> list[int]:
    tokens = [result.token for result in sampler(logits.shape[-1]).sample(logits.clone(), sequences)]
    assert None not in tokens
    return [token for token in tokens if token is not None]


# --- the slow reference: one row, one idea after the other, in Python's floats ---------------------------------


def constrained(logits: Seq[float], sequence: Sequence) -> list[float]:
    sampling, output = sequence.sampling, sequence.tokens[sequence.prompt_len :]
    row = list(logits)
    if len(output) < sampling.min_tokens:
        ends = {EOS, *sampling.stop_token_ids}
        if any(token not in ends for token in range(len(row))):
            row = [-math.inf if token in ends else value for token, value in enumerate(row)]
    for token, bias in sampling.logit_bias:
        row[token] += bias
    for token in set(sequence.tokens):
        penalty = sampling.repetition_penalty
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token, count in Counter(output).items():
        row[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return row


def softmax(row: Seq[float]) -> list[float]:
    peak = max(row)
    weights = [math.exp(value - peak) for value in row]
    return normalised(weights)


def normalised(weights: Seq[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def filtered(row: Seq[float], sampling: Sampling) -> list[float]:
    """The distribution after min_p, top_k and top_p, those exactly as likely as the last one in included."""
    probabilities = softmax([value / sampling.temperature for value in row])
    limit = sampling.min_p * max(probabilities)
    probabilities = [p if p >= limit else 0.0 for p in probabilities]
    if 0 < sampling.top_k < len(row):
        limit = sorted(probabilities, reverse=True)[sampling.top_k - 1]
        probabilities = [p if p >= limit else 0.0 for p in probabilities]
    probabilities = normalised(probabilities)
    if sampling.top_p < 1:
        mass = 0.0
        for limit in sorted(probabilities, reverse=True):
            mass += limit
            if mass >= sampling.top_p:
                break
        probabilities = [p if p >= limit else 0.0 for p in probabilities]
    return normalised(probabilities)


def invert(distribution: Seq[float], number: float) -> tuple[int, float]:
    """The token, and how far the number is from the nearest border between two tokens."""
    total, borders, token = 0.0, [], None
    for candidate, p in enumerate(distribution):
        total += p
        borders.append(total)
        if token is None and total > number:
            token = candidate
    if token is None:  # the sum was rounded down to the number, or below it
        token = max(candidate for candidate, p in enumerate(distribution) if p)
    return token, min(abs(number - border) for border in borders)


finite = st.floats(-8, 8, width=32)
samplings = st.builds(
    Sampling,
    max_tokens=st.just(99),
    seed=st.integers(-(2**63), 2**64 - 1),
    min_tokens=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, VOCAB, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.sampled_from([(), ((0, 2.5),), ((1, -100.0), (5, 1.0))]),
    stop_token_ids=st.sampled_from([(), (4, 7), (999, -5)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
rows = st.lists(finite, min_size=VOCAB, max_size=VOCAB)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], Sequence]:
    return draw(rows), sequence(draw(samplings), draw(tokens), draw(st.lists(st.integers(0, VOCAB - 1), max_size=6)))


@settings(max_examples=300, deadline=None)
@given(cases())
@example(
    ([0.0] * (VOCAB - 1) + [9.5e-27], sequence(Sampling(max_tokens=99, temperature=0.3, min_p=1.0, seed=0), [0], []))
)
def test_every_parameter_against_the_reference(case: tuple[list[float], Sequence]) -> None:
    row, one = case
    (token,) = draw(torch.tensor([row]), one)
    expected = constrained(row, one)
    if one.sampling.temperature == 0:
        assert expected[token] == pytest.approx(max(expected), abs=1e-5)
        return
    distribution = filtered(expected, one.sampling)
    best = max(expected)
    nudged = [filtered([value * scale for value in expected], one.sampling) for scale in (1 - 1e-6, 1 + 1e-6)]
    nudged += [filtered([v if v == best else v + by for v in expected], one.sampling) for by in (-1e-6, 1e-6)]
    if any([p > 0 for p in other] != [p > 0 for p in distribution] for other in nudged):
        return  # a token sits so exactly on a filter's border that single precision decides
    wanted, margin = invert(distribution, uniform(one.sampling.seed, one.total_len))
    assert token == wanted or margin < 1e-5
    assert distribution[token] > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(cases(), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_a_row_does_not_see_its_batch(batch: list[tuple[list[float], Sequence]], random: object) -> None:
    for index, (_, one) in enumerate(batch):
        one.id = f"s{index}"
    alone = {one.id: draw(torch.tensor([row]), one)[0] for row, one in batch}
    shuffled = batch[::2] + batch[1::2][::-1]
    together = draw(torch.tensor([row for row, _ in shuffled]), *[one for _, one in shuffled])
    assert dict(zip([one.id for _, one in shuffled], together, strict=True)) == alone


# --- distributions -----------------------------------------------------------------------------------------------


def chi_square(counts: Counter[int], distribution: Seq[float], draws: int) -> float:
    """In standard deviations above what is expected of that many degrees of freedom."""
    assert not [token for token in counts if distribution[token] == 0]
    likely = [(counts[token], p * draws) for token, p in enumerate(distribution) if p > 0]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in likely)
    freedom = len(likely) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(99),
        Sampling(99, temperature=0.5),
        Sampling(99, top_k=4),
        Sampling(99, top_p=0.7),
        Sampling(99, min_p=0.1),
        Sampling(99, temperature=1.5, top_k=8, top_p=0.9, min_p=0.02),
    ],
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_draws_follow_the_distribution(sampling: Sampling, over: str) -> None:
    draws = 4000
    row = [0.3 * ((7 * token) % VOCAB) for token in range(VOCAB)]
    if over == "seeds":
        seeded = [Sampling(99, seed, 0, *_tail(sampling)) for seed in range(draws)]
        sequences = [sequence(one) for one in seeded]
    else:
        sequences = [sequence(sampling, [0] * (1 + length)) for length in range(draws)]
    drawn = Counter(draw(torch.tensor([row] * draws), *sequences))
    assert chi_square(drawn, filtered(row, sampling), draws) < 4


def _tail(sampling: Sampling) -> tuple[float, float, int, float]:
    return sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p


def test_uniform_numbers_are_uniform_and_unrelated_between_neighbours() -> None:
    numbers = [[uniform(seed, position) for position in range(200)] for seed in range(200)]
    flat = [number for line in numbers for number in line]
    assert all(0 <= number < 1 for number in flat)
    assert len(set(flat)) == len(flat)
    bins = Counter(int(number * 20) for number in flat)
    assert chi_square(bins, [1 / 20] * 20, len(flat)) < 4
    for across, down in [(0, 1), (1, 0), (1, 1), (1, -1)]:
        pairs = [
            (numbers[s][p] - 0.5) * (numbers[s + across][p + down] - 0.5) for s in range(199) for p in range(1, 199)
        ]
        assert abs(sum(pairs)) / math.sqrt(len(pairs) / 144) < 4


def test_uniform_numbers_never_change() -> None:
    """Answers with a seed are a promise across versions: these are the first ones."""
    numbers = [round(uniform(seed, position), 12) for seed, position in [(0, 1), (0, 2), (1, 1), (-1, 1)]]
    assert numbers == [0.700204194565, 0.989919551012, 0.023416457214, 0.773270396809]
    assert uniform(2**64 + 5, 9) == uniform(5, 9)


FLAT = [(0.97, -1, 0.0), (0.3, -1, 0.0), (0.01, -1, 0.0), (1.0, 700, 0.0), (0.8, 3000, 0.0), (0.9, 12000, 0.0)]
FLAT += [(0.8, NUCLEUS_FIRST, 0.0), (0.5, -1, 0.5), (0.15, -1, 0.5), (0.9, 5000, 0.3)]
"""top_p, top_k, min_p"""


def test_a_large_vocabulary_is_filtered_exactly() -> None:
    """Flat enough that the most likely tokens do not suffice for top_p, with equals at the border of top_k."""
    vocab = NUCLEUS_NEXT + 4 * NUCLEUS_FIRST
    generator = torch.Generator().manual_seed(5)
    row = torch.randint(0, 40, (vocab,), generator=generator).float() / 20
    options = [Sampling(99, seed, 0, 1.0, p, k, least) for seed in range(12) for p, k, least in FLAT]
    sequences = [sequence(one) for one in options]
    drawn = draw(row.repeat(len(options), 1), *sequences)
    for token, one in zip(drawn, sequences, strict=True):
        distribution = filtered(row.tolist(), one.sampling)
        wanted, margin = invert(distribution, uniform(one.sampling.seed, one.total_len))
        assert token == wanted or margin < 1e-6


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (0.25, 4), (0.5, 4), (1 - 2.0**-52, 4)])
def test_what_has_no_weight_is_never_drawn(number: float, token: int) -> None:
    """At the exact borders as well, where the weights before and after are zero."""
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0, 3.0, 0.0]])
    assert invert_cumulative(weights, torch.tensor([[number]], dtype=torch.float64)) == [token]


def test_the_borders_of_blocks_belong_to_what_has_weight() -> None:
    """The smallest number after empty blocks, and the largest, though sums in two precisions differ."""
    for count in range(1, 130):
        weights = torch.zeros(1, 256)
        weights[0, 100 : 100 + count] = 0.1
        for number, token in [(0.0, 100), (1 - 2.0**-52, 99 + count)]:
            assert invert_cumulative(weights, torch.tensor([[number]], dtype=torch.float64)) == [token]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0, 1e-3]), min_size=1, max_size=300).filter(any),
    st.floats(0, 1, exclude_max=True),
)
@example([1.0, 2.0, 2.0, 1.0, 1.0], 1 - 2.0**-53)
def test_looking_up_by_blocks_is_looking_up(weights: list[float], number: float) -> None:
    number = min(number, 1 - 2.0**-52)
    (token,) = invert_cumulative(torch.tensor([weights]), torch.tensor([[number]], dtype=torch.float64))
    wanted, margin = invert(normalised(weights), number)
    assert weights[token] > 0
    assert token == wanted or margin < 1e-6


# --- one by one --------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = logits[1, 9] = 2.0
    assert draw(logits, *[sequence(Sampling(9, temperature=t), id=str(t)) for t in (0.0, 0.0, 1e-6)]) == [0, 4, 0]


def test_end_tokens_are_impossible_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 5], logits[0, 6] = 9.0, 8.0, 7.0
    sampling = Sampling(9, min_tokens=2, temperature=0.0, stop_token_ids=(5,))
    tokens = [draw(logits, sequence(sampling, output=[0] * length)) for length in range(4)]
    assert tokens == [[6], [6], [EOS], [EOS]]


def test_a_ban_that_leaves_nothing_is_lifted() -> None:
    sampling = Sampling(9, min_tokens=5, stop_token_ids=tuple(range(VOCAB)), temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 8] = 1.0
    assert draw(logits, sequence(sampling)) == [8]


def test_a_bias_outside_the_vocabulary_names_its_sequence() -> None:
    wrong = sequence(Sampling(9, logit_bias=((VOCAB, 1.0),)), id="wrong")
    with pytest.raises(BadRequest, match="logit_bias names token 12; this model's are 0 to 11") as caught:
        sampler().sample(torch.zeros(2, VOCAB), [sequence(Sampling(9)), wrong])
    assert caught.value.param == "wrong"


def test_structured_output_without_a_tokenizer_is_refused_by_name() -> None:
    wrong = sequence(Sampling(9, grammar=Grammar("regex", "a")), id="wrong")
    with pytest.raises(BadRequest) as caught:
        sampler().sample(torch.zeros(1, VOCAB), [wrong])
    assert caught.value.param == "wrong"


def test_logprobs_are_the_models_own() -> None:
    """Whatever temperature, bias, penalty and filter say, `logprobs` is log_softmax of the logits that came in."""
    row = torch.tensor([[0.5 * ((5 * token) % VOCAB) for token in range(VOCAB)]])
    sampling = Sampling(
        9, 7, 3, 0.4, 0.9, 5, 0.01, 0.5, 0.5, 1.2, logit_bias=((2, 3.0),), stop_token_ids=(7,), logprobs=VOCAB
    )
    (result,) = sampler().sample(row.clone(), [sequence(sampling, output=[4, 4])])
    wanted = row[0].double().log_softmax(-1)
    assert result.logprob is not None
    assert result.logprob.token == result.token
    assert result.logprob.logprob == pytest.approx(wanted[result.token].item(), abs=1e-5)
    assert [token for _, token in result.logprob.top] == sorted(range(VOCAB), key=lambda t: -row[0, t].item())
    assert sum(math.exp(logprob) for logprob, _ in result.logprob.top) == pytest.approx(1)


def test_each_row_gets_the_logprobs_it_asked_for() -> None:
    wishes = [None, 0, 2, 99]
    sequences = [sequence(Sampling(9, temperature=0.0, logprobs=wish), id=str(wish)) for wish in wishes]
    results = sampler().sample(torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)), sequences)
    assert [None if r.logprob is None else len(r.logprob.top) for r in results] == [None, 0, 2, VOCAB]
    for result in results[2:]:
        assert result.logprob is not None
        assert result.logprob.top[0] == (result.logprob.logprob, result.token)  # greedy: the most likely


def test_prompt_logprobs() -> None:
    logits = torch.randn(150, VOCAB, generator=torch.Generator().manual_seed(1))
    targets = [(3 * index) % VOCAB for index in range(150)]
    before = logits.clone()
    answers = sampler().prompt_logprobs(logits, targets, 2)
    assert torch.equal(logits, before)
    wanted = logits.log_softmax(-1)
    assert [answer.token for answer in answers] == targets
    for index, answer in enumerate(answers):
        assert answer.logprob == pytest.approx(wanted[index, targets[index]].item(), abs=1e-5)
        assert answer.top[0][0] == pytest.approx(wanted[index].max().item(), abs=1e-5)
        assert len(answer.top) == 2
    assert sampler().prompt_logprobs(logits[:0], [], 2) == ()
    assert all(answer.top == () for answer in sampler().prompt_logprobs(logits[:3], targets[:3], 0))


# --- derived state -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 12))
def test_a_moved_sequence_goes_on_with_the_same_words(seed: int, length: int, moved_at: int) -> None:
    """Penalties need the history; a sampler that never saw the sequence derives it from its tokens."""
    sampling = Sampling(
        99,
        seed,
        presence_penalty=0.8,
        frequency_penalty=0.6,
        repetition_penalty=1.4,
        top_p=0.95,
    )
    logits = torch.randn(length, 1, VOCAB, generator=torch.Generator().manual_seed(seed))

    def run(moved_at: int) -> list[int]:
        here, one = sampler(), sequence(sampling, [5, 5, 6])
        for step in range(length):
            if step == moved_at:
                here.forget(one)
                here, one = sampler(), sequence(sampling, [5, 5, 6], one.tokens[3:])
            (result,) = here.sample(logits[step].clone(), [one])
            assert result.token is not None
            one.tokens.append(result.token)
        return one.tokens

    assert run(moved_at) == run(-1)


def test_another_sequence_under_the_same_id_starts_anew() -> None:
    here = sampler()
    sampling = Sampling(9, temperature=0.0, presence_penalty=5.0)
    logits = torch.arange(VOCAB).float()[None] / VOCAB
    here.sample(logits.clone(), [sequence(sampling, output=[11])])
    assert here.sample(logits.clone(), [sequence(sampling, output=[10])])[0].token == 11
    assert here.sample(logits.clone(), [sequence(sampling)])[0].token == 11


def test_forgetting_is_idempotent() -> None:
    here, one = sampler(), sequence(Sampling(9, presence_penalty=1.0))
    here.sample(torch.zeros(1, VOCAB), [one])
    here.forget(one)
    here.forget(one)
