"""A stream that goes on here after it broke off elsewhere: `baton_resume` in the body says what was shown already.

The tokens are put through the same `Output` and `Writer` as if the engine had just said them, and what comes out is
thrown away. So detokenizer, stop strings, parsers, offsets and counts are where they were, and the next event is the
one that was due.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.api.dialect import Writer
from baton.api.job import Job, ModelContext
from baton.api.output import Output
from baton.base.errors import BadRequest
from baton.base.messages import Finish, TokenLogprob, Tokens

FIELD = "baton_resume"


def check(job: Job, context: ModelContext) -> None:
    """Raises `BadRequest` if the request resumes what it cannot."""
    resume = job.resume
    if resume is None:
        return
    total = len(job.prompts) * job.n
    if not job.stream:
        _refuse("is for streams")
    if not job.continuable:
        _refuse("cannot go with logprobs of the prompt, nor with those of earlier tokens in every event")
    if len(resume.outputs) != total:
        _refuse(f"has {len(resume.outputs)} outputs; the request has {total}")
    for k, before in enumerate(resume.outputs):
        if before.tokens and not (min(before.tokens) >= 0 and max(before.tokens) < context.vocab_size):
            _refuse(f"has token ids that are not at least 0 and less than {context.vocab_size}")
        most = job.sampling(k, context).max_tokens
        if len(before.tokens) > most:
            _refuse(f"has {len(before.tokens)} tokens of an output that has {most} at most")


def _refuse(problem: str) -> None:
    raise BadRequest(f"{FIELD} {problem}", param=FIELD)


def replay(job: Job, outputs: Sequence[Output], writer: Writer, context: ModelContext) -> bytes:
    """Bring outputs and writer to where the stream broke off. Returns what was not shown then: ends of outputs that
    need no more tokens. `Output.ended` says which those are."""
    if job.resume is None:
        return b""
    events = b""
    for k, (output, before) in enumerate(zip(outputs, job.resume.outputs, strict=True)):
        if before.tokens:
            end = job.sampling(k, context).end(before.tokens[-1], len(before.tokens), context.eos_token_ids)
            rest = _replay(output, writer, before.tokens, end)
            events += b"" if before.finished else rest
        if before.finished and not output.ended():  # by somebody's wish
            writer.delta(output, output.abort("aborted"))
    return events


def _replay(output: Output, writer: Writer, tokens: Sequence[int], end: Finish | None) -> bytes:
    """Returns the event of the output's end, if it has one: it comes with the last token, or after it where only the
    number of tokens is the reason."""
    steps = [(tokens[:-1], None), (tokens[-1:], end)]
    if end is not None and end.reason == "length":
        steps = [(tokens, None), ([], end)]
    event = b""
    for part, finish in steps:
        if not output.ended() and (part or finish is not None):
            event = _show(output, writer, part, finish)
    return event if output.ended() else b""


def _show(output: Output, writer: Writer, tokens: Sequence[int], end: Finish | None) -> bytes:
    wanted = output.plan.sampling.logprobs is not None
    logprobs = tuple(TokenLogprob(None, token) for token in tokens) if wanted else ()
    return writer.delta(output, output.take(Tokens("", tuple(tokens), logprobs, finish=end)))
