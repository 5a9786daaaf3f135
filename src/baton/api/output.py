"""One sequence's answer as it grows: tokens in, text out, stop strings found, the end recognised."""

from __future__ import annotations

from baton.api.job import FinishKind, Prompt
from baton.api.sampling import Plan
from baton.api.stops import StopMatcher
from baton.api.text import TextCodec
from baton.base.messages import Timeline, TokenLogprob, Tokens, Usage


class Output:
    """The answer of one sequence. `take` eats the engine's messages; the writers read the rest."""

    __slots__ = (
        "_detokenizer",
        "_stops",
        "cached_tokens",
        "finish",
        "index",
        "logprobs",
        "matched",
        "message",
        "opened",
        "parts",
        "plan",
        "prompt",
        "prompt_logprobs",
        "retractions",
        "rid",
        "sent_tokens",
        "timeline",
        "tokens",
    )

    def __init__(self, index: int, rid: str, prompt: Prompt, plan: Plan, tokenizer: TextCodec) -> None:
        self.index = index
        """Of the sequence in its request."""
        self.rid = rid
        self.prompt = prompt
        self.plan = plan
        self.parts: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.cached_tokens = 0
        self.retractions = 0
        self.finish: FinishKind | None = None
        self.matched: int | str | None = None
        self.message = ""
        """Why it was aborted."""
        self.timeline: Timeline | None = None
        self.opened = False
        """A stream has shown its first event."""
        self.sent_tokens = 0
        """How many of `tokens` a stream has shown."""
        self._detokenizer = tokenizer.detokenizer(prompt.tokens, skip_special=plan.skip_special_tokens)
        self._stops = StopMatcher(plan.stops) if plan.stops else None

    @property
    def text(self) -> str:
        if len(self.parts) > 1:
            self.parts = ["".join(self.parts)]
        return self.parts[0] if self.parts else ""

    @property
    def usage(self) -> Usage:
        shown = 0 if self.plan.scored_only else len(self.tokens)
        return Usage(len(self.prompt.tokens), shown, self.cached_tokens, self.retractions)

    def ended(self) -> bool:
        return self.finish is not None

    @property
    def stopped_by_text(self) -> bool:
        """The engine does not know yet: it must be told to stop."""
        return isinstance(self.matched, str)

    def take(self, message: Tokens) -> str:
        """Returns the text that can be shown now. After the end nothing is taken any more."""
        if self.finish is not None:
            return ""
        if not self.tokens:
            self.prompt_logprobs = message.prompt_logprobs
        self.cached_tokens = message.cached_tokens
        text = self._text(message)
        if message.finish is not None and self.finish is None:
            self.finish, self.matched = message.finish.reason, message.finish.matched_token
            text += self._rest()
        if message.usage is not None:
            self.cached_tokens, self.retractions = message.usage.cached_tokens, message.usage.retractions
        if message.timeline is not None:
            self.timeline = message.timeline
        if self.plan.scored_only:
            return ""
        if text:
            self.parts.append(text)
        return text

    def abort(self, reason: str) -> str:
        """Somebody ended it; what there is stays. Returns text that was held back."""
        if self.finish is not None:
            return ""
        self.finish, self.message = "abort", reason
        text = self._rest()
        self.parts.append(text)
        return text

    def _text(self, message: Tokens) -> str:
        if self._stops is None and message.finish is None and len(message.tokens) == 1:  # nearly always
            self.tokens += message.tokens
            self.logprobs += message.logprobs
            return self._detokenizer.feed(message.tokens[0])
        shown = len(message.tokens) - (self._ends_silently(message))
        text = ""
        for at, token in enumerate(message.tokens):
            self.tokens.append(token)
            if message.logprobs:
                self.logprobs.append(message.logprobs[at])
            if at < shown:
                text += self._matched(self._detokenizer.feed(token))
            if self.finish is not None:
                break
        return text

    def _matched(self, text: str) -> str:
        if self._stops is None or len(self.tokens) < self.plan.sampling.min_tokens:
            return text
        shown, stop = self._stops.feed(text)
        if stop is not None:
            self.finish, self.matched = "stop", stop
            return shown + stop if self.plan.keep_stop else shown
        return shown

    def _ends_silently(self, message: Tokens) -> bool:
        """The last token is a stop token, whose text is not part of the answer."""
        finish = message.finish
        return finish is not None and finish.matched_token is not None and not self.plan.keep_stop

    def _rest(self) -> str:
        """At the end: what detokenizer and matcher hold back. An incomplete character cannot complete a stop."""
        text = self._detokenizer.finish()
        return (self._stops.finish() if self._stops is not None else "") + text
