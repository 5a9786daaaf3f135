"""The table of the hand-off, and what it promises under any order of events."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.disagg.handoff import TABLE, Event, Handoff, OutOfTurn, Patience, State, diagram

LOSSES = (Event.CANCELLED, Event.EXPIRED, Event.BROKEN)


def test_every_state_has_a_row() -> None:
    assert set(TABLE) == set(State)


@pytest.mark.parametrize("state", [state for state in State if not state.terminal])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_open_state_can_be_lost(state: State, loss: Event) -> None:
    assert TABLE[state][loss] in (State.LOST, State.DRAINING)


@pytest.mark.parametrize("state", [State.DONE, State.LOST])
def test_nothing_follows_an_end(state: State) -> None:
    assert not TABLE[state]
    handoff = Handoff(1, 0.0, state=state)
    for event in Event:
        with pytest.raises(OutOfTurn):
            handoff.apply(event, 1.0)
    assert (handoff.state, handoff.since) == (state, 0.0)


@given(st.lists(st.sampled_from(Event), max_size=20))
def test_any_history(history: list[Event]) -> None:
    """Once bytes may come, pages are let go only by delivery or by silence; a loss is never undone."""
    handoff, offered, lost = Handoff(7, 0.0), False, False
    for now, event in enumerate(history, 1):
        before = handoff.state
        try:
            after = handoff.apply(event, float(now))
        except OutOfTurn:
            assert handoff.state is before
            assert event not in TABLE[before]
            continue
        offered = offered or event is Event.OFFERED
        lost = lost or event in LOSSES
        if after is State.LOST:
            assert lost
            assert event is Event.SETTLED or not offered
        if after is State.DONE:
            assert offered
            assert not lost
            assert event is Event.DELIVERED
        if lost:
            assert after in (State.DRAINING, State.LOST)
        assert handoff.since == (now if after is not before else handoff.since)


def test_patience() -> None:
    patience = Patience(meet=30, move=5, drain=10)
    handoff = Handoff(1, since=100.0)
    assert handoff.deadline(patience) == 130
    handoff.apply(Event.OFFERED, 110)
    assert handoff.deadline(patience) == 140  # nobody has answered the offer
    handoff.met, handoff.seen = True, 120.0
    assert handoff.deadline(patience) == 125
    handoff.apply(Event.STARTED, 124)
    assert handoff.deadline(patience) == 129
    handoff.apply(Event.EXPIRED, 129)
    handoff.apply(Event.CANCELLED, 135)  # known already: the clock of the draining does not start anew
    assert handoff.deadline(patience) == 139
    handoff.apply(Event.SETTLED, 136)
    assert handoff.deadline(patience) == float("inf")


def test_a_queue_at_d_is_no_reason_to_give_up() -> None:
    """Patience is measured by what D says, not from the beginning; after the offer it begins anew."""
    patience = Patience(meet=30, move=8, drain=10)
    assert patience.beat == 2
    handoff = Handoff(1, since=100.0)
    handoff.apply(Event.QUEUED, 101)
    assert handoff.deadline(patience) == 109
    handoff.seen = 500.0
    assert handoff.deadline(patience) == 508
    handoff.apply(Event.OFFERED, 507)
    assert handoff.deadline(patience) == 537
    with pytest.raises(OutOfTurn):
        handoff.apply(Event.QUEUED, 508)


def test_the_docs_show_this_very_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "disagg.md"
    assert diagram() in page.read_text()
