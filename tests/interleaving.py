"""Every interleaving of a few threads over shared memory: programs in, states and violations out.

A thread is a generator that yields operations ``(function, arguments...)`` and is sent their
results. An operation is one atomic access: it is called with the memory (a list that it may change)
and its arguments, returns what it found, or BLOCKED where it has to wait. Between two operations a
thread only computes, so to interleave operations is to interleave everything.

Generators cannot be copied, so a thread is never run but once for each prefix of results that makes
a difference: what it does next depends on where it stands and on its variables alone, and threads
that are equal in these are one. So a program has to keep each result in a variable of its own, not
within an expression, before it asks for the next, and the steps of a loop have to differ in the
loop's variable. A state is the memory and the place of each thread; states that
were seen before are not explored again.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeAlias

BLOCKED = object()

Memory: TypeAlias = list[Any]
Operation: TypeAlias = tuple[Any, ...]
Program: TypeAlias = Callable[[], Generator[Operation, Any, None]]
Places: TypeAlias = tuple[int, ...]
State: TypeAlias = tuple[int, Places]
Fault: TypeAlias = tuple[str, tuple[tuple[Any, ...], Places]]

DONE = -1


class Violation(Exception):
    """Something that must not be; the text says what, and the steps that led there."""


class Thread:
    """The places that a program can come to, found as they are needed; DONE is behind its end."""

    def __init__(self, name: str, program: Program) -> None:
        self.name, self._program = name, program
        self._known: dict[Any, int] = {}
        self._results: list[list[Any]] = []
        self.operations: list[Operation] = []
        self._next: dict[tuple[int, Any], int] = {}
        self.start = self._place([])

    def _place(self, results: list[Any]) -> int:
        generator = self._program()
        try:
            operation = next(generator)
            for result in results:
                operation = generator.send(result)
        except StopIteration:
            return DONE
        # The operation too: it is made of variables that may be gone when it is asked for again.
        key = (_frames(generator), operation)
        place = self._known.setdefault(key, len(self._known))
        if place == len(self.operations):
            self.operations.append(operation)
            self._results.append(results)
        generator.close()
        return place

    def after(self, place: int, result: Any) -> int:
        """Where the thread is once the operation at ``place`` gave ``result``."""
        found = self._next.get((place, result))
        if found is None:
            found = self._place([*self._results[place], result])
            self._next[place, result] = found
        return found


def _frames(generator: Any) -> tuple[Any, ...]:
    """Where a generator stands, and its variables; with those that it waits for."""
    found = []
    while generator is not None:
        frame = generator.gi_frame
        variables = {k: v for k, v in frame.f_locals.items() if k != "self"}
        found.append((frame.f_code.co_name, frame.f_lasti, _frozen(variables)))
        generator = generator.gi_yieldfrom
    return tuple(found)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(one) for one in value)
    return value


class Explorer:
    """All states that can be reached from a memory with every thread at its start."""

    def __init__(
        self,
        threads: Sequence[Thread],
        memory: Memory,
        faults: Callable[[tuple[Any, ...], Places], Iterator[Fault]] = lambda *_: iter(()),
        invariant: Callable[[Sequence[Any]], str | None] = lambda _: None,
    ) -> None:
        self.threads, self._faults, self._invariant = threads, faults, invariant
        self._memories: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        start = self._number(tuple(memory)), tuple(thread.start for thread in threads)
        self._came: dict[State, State | None] = {start: None}

    def _number(self, memory: tuple[Any, ...]) -> int:
        number = self._numbers.setdefault(memory, len(self._memories))
        if number == len(self._memories):
            self._memories.append(memory)
            if broken := self._invariant(memory):
                raise Violation(broken)
        return number

    def _step(self, state: State, number: int) -> State | None:
        """What a step of one thread leads to; None where it cannot take one. Raises Violation."""
        memory, places = state
        place = places[number]
        if place == DONE:
            return None
        thread = self.threads[number]
        operation = thread.operations[place]
        changed = list(self._memories[memory])
        result = operation[0](changed, *operation[1:])
        if result is BLOCKED:
            return None
        after = thread.after(place, result)
        return self._number(tuple(changed)), (*places[:number], after, *places[number + 1 :])

    def _steps(self, state: State) -> Iterator[tuple[int, State]]:
        for number in range(len(self.threads)):
            following = self._step(state, number)
            if following is not None:
                yield number, following
        for _, (memory, places) in self._faults(self._memories[state[0]], state[1]):
            yield DONE, (self._number(memory), places)

    def explore(self, must_finish: Sequence[int] = ()) -> int:
        """Visit every state; return their number. Raises Violation with a shortest way there.

        From each state the threads of ``must_finish`` have to be able to end by themselves, all
        others standing still.
        """
        # Who comes to a state by a step of one of those that must finish.
        before: dict[State, list[State]] = {}
        queue = deque(self._came)
        while queue:
            state = queue.popleft()
            try:
                for number, following in self._steps(state):
                    if number in must_finish and following != state:
                        before.setdefault(following, []).append(state)
                    if following not in self._came:
                        self._came[following] = state
                        queue.append(following)
            except Violation as violation:
                raise Violation("\n".join([str(violation), *self._way(state)])) from None
        if must_finish:
            self._check_that_they_finish(must_finish, before)
        return len(self._came)

    def _check_that_they_finish(self, who: Sequence[int], before: dict[State, list[State]]) -> None:
        able = {s for s in self._came if all(s[1][number] == DONE for number in who)}
        queue = deque(able)
        while queue:
            for state in before.get(queue.popleft(), ()):
                if state not in able:
                    able.add(state)
                    queue.append(state)
        for state in self._came:
            if state not in able:
                way = self._way(state)
                raise Violation("\n".join(["they wait for somebody who stands still", *way]))

    def _way(self, state: State) -> list[str]:
        names: list[str] = []
        while (came := self._came[state]) is not None:
            names.append(self._name(came, state))
            state = came
        return names[::-1]

    def _name(self, state: State, following: State) -> str:
        for number, found in self._steps(state):
            if found == following and number != DONE:
                thread = self.threads[number]
                operation = thread.operations[state[1][number]]
                return f"{thread.name}: {operation[0].__name__}{operation[1:]}"
        faults = self._faults(self._memories[state[0]], state[1])
        return next(n for n, (m, p) in faults if (self._number(m), p) == following)
