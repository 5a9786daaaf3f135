"""What is asked while things break, and what may come back: the answer of the undisturbed run, to the letter."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import httpx
import openai

from tests.e2e.asking import Answer, Ask, Client, alike, client

AT_ONCE = 16
LONG = "The runner who has finished a lap hands the baton to the next one. " * 3


@dataclass(frozen=True, slots=True)
class Question:
    endpoint: str
    ask: Ask
    stream: bool

    def __str__(self) -> str:
        return f"{self.endpoint}{' stream' if self.stream else ''} {self.ask}"


def _variants() -> Iterator[tuple[Ask, bool]]:
    """(what is asked, whether `/generate` may stream it: its streams with logprobs cannot be continued)."""
    yield Ask(LONG, max_tokens=150), True
    yield Ask("hello there, one two three", max_tokens=200), True
    yield Ask(LONG + "And?", max_tokens=120, temperature=0.9, seed=11), True
    yield Ask("one two " * 20, max_tokens=80, temperature=1.0, seed=5, n=2), True
    yield Ask(LONG + "Stop!", max_tokens=200, temperature=0.9, seed=3, stop=("Boxk", "hand-over")), True
    yield Ask("hello there " * 9, max_tokens=60, temperature=0.8, top_logprobs=2), False


QUESTIONS = [
    Question(endpoint, ask, stream)
    for ask, anywhere in _variants()
    for endpoint in ("chat", "completions", "generate")
    for stream in (True, False)
    if anywhere or not stream or endpoint != "generate"
]


class End(enum.Enum):
    """How a request ended for its client."""

    EXACT = "exact"
    WRONG = "wrong"
    """Status 200 and a proper end, but not the right text: a gap, a repeat, other words, another usage."""
    EVENT = "error event"
    """A stream that ended with an error in its own words."""
    REFUSED = "refused"
    """An error status."""
    LOST = "lost"
    """The connection broke, or a stream ended without its end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    question: Question
    end: End
    seconds: float
    words: str = ""
    """What went wrong."""


@dataclass(slots=True)
class Load:
    """Asks questions, in turn, until there are `count` of them; knows the right answers."""

    right: dict[Question, Answer] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=lambda: list(QUESTIONS))
    patience: float = 60.0
    """Seconds; who has no answer by then has lost it."""
    outcomes: list[Outcome] = field(default_factory=list)
    begun: int = 0
    _open: set[int] = field(default_factory=set)
    """Numbers of those that are not answered yet."""

    async def learn(self, url: str) -> None:
        """The right answers, from workers that nobody disturbs."""
        async with client(url) as one:
            answers = await asyncio.gather(*(_put(one, question) for question in QUESTIONS))
        self.right = dict(zip(QUESTIONS, answers, strict=True))

    async def ask(self, url: str, count: int, *, retry: Callable[[], str] | None = None) -> list[Outcome]:
        """`count` requests, `AT_ONCE` at any time. `retry`: another gateway for a client whose connection broke."""
        left = iter(range(count))
        mine: list[Outcome] = []

        async def one_by_one(one: Client) -> None:
            for _ in left:
                number = self.begun
                question = self.questions[number % len(self.questions)]
                self.begun += 1
                self._open.add(number)
                outcome = await self._outcome(one, question)
                while retry is not None and outcome.end is End.LOST:
                    async with client(retry()) as other:
                        outcome = await self._outcome(other, question)
                mine.append(outcome)
                self.outcomes.append(outcome)
                self._open.discard(number)

        async with client(url) as one:
            await asyncio.gather(*(one_by_one(one) for _ in range(AT_ONCE)))
        return mine

    async def answered(self, count: int) -> None:
        """Until so many have been answered, since the beginning of time."""
        await _until(lambda: len(self.outcomes) >= count)

    async def those_in_flight(self) -> None:
        """Until all that are open now have been answered."""
        now = set(self._open)
        await _until(lambda: not now & self._open)

    async def _outcome(self, one: Client, question: Question) -> Outcome:
        begun = time.monotonic()
        end, words = await self._end(one, question)
        return Outcome(question, end, time.monotonic() - begun, words)

    async def _end(self, one: Client, question: Question) -> tuple[End, str]:
        try:
            async with asyncio.timeout(self.patience):
                answer = await _put(one, question)
        except TimeoutError:
            return End.LOST, f"no answer within {self.patience:g} s"
        except (openai.APIConnectionError, httpx.TransportError) as error:
            return End.LOST, repr(error)
        except openai.APIStatusError as error:
            return End.REFUSED, str(error)
        except openai.APIError as error:  # in a stream
            return End.EVENT, str(error)
        except KeyError as error:  # an event of `/generate` without text
            return End.EVENT, repr(error)
        except AssertionError as error:
            return (End.REFUSED if "error" in str(error) else End.LOST), str(error)
        except (AttributeError, TypeError, ValueError) as error:
            return End.WRONG, f"an answer of another shape: {error!r}"
        right = self.right[question]
        if alike(answer, right):
            return End.EXACT, ""
        if any(said.finish is None for said in answer.said):
            return End.LOST, f"a stream without an end: {answer}"
        return End.WRONG, f"{answer} is not {right}"


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def _put(one: Client, question: Question) -> Answer:
    answer = await one.ask(question.endpoint, question.ask, stream=question.stream)
    return replace(answer, cached_tokens=0)


def tally(outcomes: list[Outcome]) -> Counter[End]:
    return Counter(outcome.end for outcome in outcomes)


def assert_exact(outcomes: list[Outcome]) -> None:
    bad = [outcome for outcome in outcomes if outcome.end is not End.EXACT]
    shown = "\n".join(f"{one.end.value} after {one.seconds:.1f} s: {one.question}: {one.words}" for one in bad[:6])
    assert not bad, f"{len(bad)} of {len(outcomes)} not as in the undisturbed run:\n{shown}"
