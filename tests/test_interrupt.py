"""Signals while something long runs: stop at a good place, and leave everybody else's signals alone."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from talos_fast.interrupt import interruptible, uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag_and_interrupts_at_the_end(number):
    before = signal.getsignal(number)
    reached = False
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        reached = interrupted()
    assert reached and signal.getsignal(number) is before


def test_the_second_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")


def test_an_error_of_the_work_is_not_hidden():
    with pytest.raises(ZeroDivisionError), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError


def test_signals_that_are_ignored_or_handled_by_the_program_are_left_to_it():
    heard = []
    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: lambda number, frame: heard.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with interruptible() as interrupted:
            for number in handlers:
                os.kill(os.getpid(), number)
            assert not interrupted() and heard == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def started_then_asleep(started) -> None:
    started.set()
    time.sleep(60)


def test_processes_that_are_forked_meanwhile_can_be_ended():
    """Once they run: in a process that is just being forked Python forgets a signal that has a handler."""
    context = multiprocessing.get_context("fork")
    with interruptible() as interrupted:
        started = context.Event()
        child = context.Process(target=started_then_asleep, args=(started,))
        child.start()
        assert started.wait(60)
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM and not interrupted()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM])
def test_signals_wait_for_what_must_not_be_left_half_done(number):
    before, done = signal.getsignal(number), []
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            done.append(True)
        assert done and signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_every_signal_that_waited_is_delivered():
    heard, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def terminate(number, frame):
        heard.append(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not heard
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_other_threads_signals_are_left_alone():
    """Only the main thread may handle them."""
    before, found = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []

    def work():
        with interruptible() as interrupted, uninterrupted():
            found.extend([interrupted(), *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, *before]
