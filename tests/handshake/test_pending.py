"""When stage 1 is sent again, when we give up, and which packets wait."""

from nebula_mp.handshake.pending import QUEUE_PACKETS, Attempt, GaveUp, Pending
from nebula_mp.newtypes import Seconds


def pending(attempts_max: int = 3) -> Pending:
    return Pending(now=Seconds(0), interval=Seconds(0.1), attempts_max=attempts_max)


def test_stage_1_is_sent_again_with_linear_back_off_and_then_given_up() -> None:
    handshake = pending()
    sent_at = []

    while isinstance(action := handshake.handle_timeout(now := handshake.next_timeout()), Attempt):
        sent_at.append(round(now, 3))

    assert sent_at == [0.0, 0.1, 0.3]
    assert action == GaveUp(attempts=3, waited=Seconds(0.1 + 0.2 + 0.3))


def test_with_nebulas_defaults_the_last_attempt_is_after_4500_ms_and_the_end_after_5500_ms() -> None:
    handshake = pending(attempts_max=10)
    times = []

    while isinstance(handshake.handle_timeout(now := handshake.next_timeout()), Attempt):
        times.append(round(now, 3))

    assert times == [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.1, 2.8, 3.6, 4.5]
    assert round(handshake.next_timeout(), 3) == 5.5


def test_nothing_happens_before_the_deadline() -> None:
    handshake = pending()
    handshake.handle_timeout(Seconds(0))

    assert handshake.handle_timeout(Seconds(0.099)) is None
    assert handshake.next_timeout() == 0.1


def test_a_trigger_makes_the_next_attempt_due_at_once_and_counts_as_one() -> None:
    handshake = pending()
    handshake.handle_timeout(Seconds(0))

    handshake.trigger(Seconds(0.05))

    assert handshake.handle_timeout(Seconds(0.05)) == Attempt(2)
    assert round(handshake.next_timeout(), 3) == 0.25


def test_a_trigger_does_not_hasten_the_end() -> None:
    handshake = pending(attempts_max=1)
    handshake.handle_timeout(Seconds(0))

    handshake.trigger(Seconds(0.05))

    assert handshake.handle_timeout(Seconds(0.05)) is None


def test_at_most_a_hundred_packets_wait_and_they_come_out_in_order() -> None:
    handshake = pending()
    packets = [bytes([number]) for number in range(QUEUE_PACKETS)]

    accepted = [handshake.try_queue(packet) for packet in packets]

    assert all(accepted)
    assert not handshake.try_queue(b"one too many")
    assert handshake.take_queue() == packets
    assert handshake.take_queue() == []
