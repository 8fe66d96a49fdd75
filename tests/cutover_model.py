"""A model of the cutover's switch, explored exhaustively: every order of steps, losses and crashes.

Who takes part, each step of each being one transition:

sender     closes the gate, records *committing* beside two images one after the other, makes the
           gate one that opens only behind the fence, sends PROMOTE, waits; asks again over a new
           connection; fences or rolls back, image by image; gives up. Records that take too long
           it leaves to a thread, which takes them back, and lets the guest go on meanwhile
resolver   ``replicator resolve``: takes the lease, asks, settles image by image
server     opens or fences a gate whose holder died, or whose time is over. There is no clock here:
           it may be over at any moment, and a sender that was stopped goes on at any later one
target     promotes, or voids a token; each is durable before it is answered
network    any message may be lost, or delivered at any later moment, in any order
crashes    of sender, resolver, target and the source's host, between any two steps
operator   mounts anew, also while sender and resolver live, which then have the control file of a
           mount that is gone: their gate and their fence hold nobody's writes
           ``promote --force`` at the target, while the source is down with an unknown outcome

There are two attempts, each with a token of its own. What is durable is so at once: that the files
are synced before the step counts as done is for fusedisk.state and tests/store_simulation.py. A
server that dies changes nothing here: gate and fence are in memory that outlives it.

A PROMOTE counts only in the session that it was sent in, which a newer session, a question about
the outcome, or the target's death ends. Nothing else is assumed of the network.

Checked in every reachable state:

- never both: the source does not take writes while the replica is promoted
- never neither: a mount that refuses writes has its target promoted, or a record that says
  *unknown*, or a fence that the next `resolve` lowers
- a replica that was promoted by a cutover lacks nothing: the source took no write after the gate
  was closed for it
- no void token is ever the one that the replica is promoted with
- resolve settles: where nothing holds the lease, running it to its end, undisturbed, leaves exactly
  one side writable

With no mutation all hold in all of the 15133 states. Each of `MUTATIONS` leaves out one thing that
the code does, and breaks one of them, which shows that the model can tell.
"""

from collections import deque
from collections.abc import Iterator

from cutover_state import IMAGES, Process, State, Step, record_of, say, with_record, writable

ATTEMPTS = 2
FORCED = -1

MUTATIONS = (
    "committing is not synced",
    "promote is sent before committing",
    "a void token is promoted",
    "aborted is answered before it is durable",
    "a lost answer opens the gate",
    "an abandoned gate opens in any case",
    "the gate opens before the fence is up",
    "a mount ignores the record",
    "resolve without the lease",
    "another promotion is answered with aborted",
    "resolve leaves a fence without a record",
    "the mount is not looked at before promote",
    "a mount looks for a record first",
    "promote does not ask for the gate",
    "the gate is only looked at before promote",
    "a gate whose time is over opens in any case",
    "a record left behind is not under the lease",
)


class Violation(Exception):
    """An invariant does not hold; the text says which, and the steps that led there."""


class Model:
    """The transitions, with one mutation or none."""

    def __init__(self, mutation: str = "") -> None:
        assert mutation in ("", *MUTATIONS)
        self._mutation = mutation

    def steps(self, state: State) -> Iterator[Step]:
        everybody = (self._sender, self._thread, self._resolver, self._server, self._target)
        for who in (*everybody, self._faults):
            for name, following in who(state):
                # A guest writes whenever it may.
                written = following.written or writable(following)
                yield name, following._replace(written=written)

    def _is(self, mutation: str) -> bool:
        return self._mutation == mutation

    # --- the source ----------------------------------------------------------------------------

    def _sender(self, s: State) -> Iterator[Step]:
        p = s.sender
        match p.at:
            case "off":
                if (
                    s.mounted
                    and s.attempts < ATTEMPTS
                    and not s.lease
                    and not s.gate
                    # A promoted replica refuses the last pass.
                    and s.promoted is None
                    and record_of(s)[0] == "none"
                    and not s.fence
                ):
                    closed = s._replace(gate=True, lease="sender", session=s.attempts)
                    closed = closed._replace(
                        attempts=s.attempts + 1,
                        sender=Process("recording", s.attempts),
                        written=False,
                    )
                    yield "the sender closes the gate", closed
            case "recording":
                if self._is("promote is sent before committing"):
                    yield "the sender sends PROMOTE early", say(s, "promote", p.token)
                yield from self._per_image(s, "sender", "committing", "recorded")
                # The guest goes on; the thread may come to write the rest at any time.
                leaves = s if p.stale else s._replace(gate=False, begun=False)
                kept = not self._is("a record left behind is not under the lease")
                yield (
                    "the record is left behind",
                    leaves._replace(
                        lease="thread" if kept else "",
                        sender=Process(),
                        thread=p._replace(at="recording"),
                    ),
                )
            case "recorded":
                yield "the bound is exceeded", self._at(s, "sender", "taking back")
                # The gate of a mount that is gone stays as it was.
                gone = p.stale or not s.mounted
                held = s.gate or gone
                if held or self._is("promote does not ask for the gate"):
                    kept = held and not self._is("the gate is only looked at before promote")
                    begun = s if gone else s._replace(begun=kept)
                    yield "the sender begins the promotion", self._at(begun, "sender", "begun")
                else:
                    yield "the gate was let go", self._at(s, "sender", "taking back")
            case "begun":
                gone = p.stale and not self._is("the mount is not looked at before promote")
                after = "taking back" if gone else "sending"
                yield "the sender looks at the mount", self._at(s, "sender", after)
            case "sending":
                sent = say(self._at(s, "sender", "waiting"), "promote", p.token)
                yield "the sender sends PROMOTE", sent
            case "waiting":
                after = "clearing" if self._is("a lost answer opens the gate") else "asking"
                yield "the answer is lost", self._at(s, "sender", after)
                yield from self._answers(s, "sender")
            case "taking back":
                yield from self._per_image(s, "sender", "none", "lowering")
            case "asking":
                yield "the sender asks", say(s, "resolve", p.token)
                yield "the sender gives up", self._open_gate(self._with_fence(s, "sender", True))
                yield from self._answers(s, "sender")
            case _:
                yield from self._settling(s, "sender")

    def _thread(self, s: State) -> Iterator[Step]:
        match s.thread.at:
            case "recording":
                yield from self._per_image(s, "thread", "committing", "taking back")
            case "taking back":
                yield from self._per_image(s, "thread", "none", "done")
            case "done":
                yield "the thread ends", self._end(s, "thread")

    def _resolver(self, s: State) -> Iterator[Step]:
        if s.resolver.at == "off":
            if not s.mounted:
                return
            if s.lease and not self._is("resolve without the lease"):
                return
            kind, token = record_of(s)
            lease = s.lease or "resolver"
            if kind == "committing":
                begun = s._replace(lease=lease, resolver=Process("asking", token))
                yield "resolve begins", begun
            elif (
                kind == "none"
                and s.fence
                and not self._is("resolve leaves a fence without a record")
            ):
                yield "resolve lowers a fence left over", s._replace(fence=False, begun=False)
        elif s.resolver.at == "asking":
            yield "resolve asks", say(s, "resolve", s.resolver.token)
            yield from self._answers(s, "resolver")
        else:
            yield from self._settling(s, "resolver")

    def _answers(self, s: State, who: str) -> Iterator[Step]:
        token = self._process(s, who).token
        for kind, after in (("promoted", "fencing"), ("aborted", "clearing")):
            if (kind, token) in s.network:
                heard = s._replace(network=s.network - {(kind, token)})
                yield f"the {who} hears {kind}", self._at(heard, who, after)

    def _settling(self, s: State, who: str) -> Iterator[Step]:
        match self._process(s, who).at:
            case "fencing":
                if self._is("the gate opens before the fence is up") and who == "sender" and s.gate:
                    yield "the gate opens early", s._replace(gate=False)
                    return
                yield (
                    f"the {who} raises the fence",
                    self._at(self._with_fence(s, who, True), who, "recording fenced"),
                )
            case "recording fenced":
                yield from self._per_image(s, who, "fenced", "done")
            case "clearing":
                yield from self._per_image(s, who, "none", "lowering")
            case "lowering":
                lowered = self._with_fence(s, who, False)
                yield f"the {who} lowers the fence", self._at(lowered, who, "done")
            case "done":
                if who == "sender":
                    yield "the sender opens the gate", self._open_gate(s)
                else:
                    yield "resolve ends", self._end(s, who)

    def _per_image(self, s: State, who: str, kind: str, after: str) -> Iterator[Step]:
        p = self._process(s, who)
        done = with_record(s, p.done, kind, p.token)
        done = done._replace(**{who: p._replace(done=p.done + 1)})
        if p.done + 1 == IMAGES:
            done = self._at(done, who, after)
        yield f"the {who} records {kind} beside image {p.done}", done

    def _server(self, s: State) -> Iterator[Step]:
        if s.mounted and s.gate and not s.lease:
            begun = record_of(s)[0] != "none"
            fence = s.fence or (begun and not self._is("an abandoned gate opens in any case"))
            opened = s._replace(gate=False, begun=False, fence=fence)
            yield "the server opens an abandoned gate", opened
        if s.mounted and s.gate and s.lease:
            careless = self._is("a gate whose time is over opens in any case")
            fence = s.fence or (s.begun and not careless)
            yield (
                "the time of the gate is over",
                s._replace(gate=False, begun=False, fence=fence),
            )

    @staticmethod
    def _process(s: State, who: str) -> Process:
        process: Process = getattr(s, who)
        return process

    def _at(self, s: State, who: str, at: str) -> State:
        p = self._process(s, who)
        return s._replace(**{who: Process(at, p.token, stale=p.stale)})

    def _with_fence(self, s: State, who: str, fence: bool) -> State:
        if self._process(s, who).stale:
            return s
        return s._replace(fence=fence, begun=s.begun and fence)

    def _end(self, s: State, who: str) -> State:
        lease = "" if s.lease == who else s.lease
        return s._replace(**{who: Process()}, lease=lease)

    def _open_gate(self, s: State) -> State:
        opened = s if s.sender.stale else s._replace(gate=False, begun=False)
        return self._end(opened, "sender")

    # --- the target, and what goes wrong -------------------------------------------------------

    def _target(self, s: State) -> Iterator[Step]:
        for message in s.network:
            kind, token = message
            heard = s._replace(network=s.network - {message})
            if kind == "promote" and s.session == token:
                if s.promoted is None and (
                    token not in s.void or self._is("a void token is promoted")
                ):
                    done = heard._replace(promoted=token)
                    yield "the target promotes", say(done, "promoted", token)
            elif kind == "resolve":
                yield "the target is asked", self._asked(heard, token)
        gone = not s.mounted and not s.mounting and not s.network
        if gone and s.promoted is None and record_of(s)[0] == "committing":
            yield "the operator promotes by force", s._replace(promoted=FORCED, session=None)

    def _asked(self, s: State, token: int) -> State:
        # Whoever asks takes the place of an older session.
        ended = s if self._is("a void token is promoted") else s._replace(session=None)
        other = self._is("another promotion is answered with aborted") and s.promoted != token
        if s.promoted is not None and not other:
            return say(ended, "promoted", token)
        if not self._is("aborted is answered before it is durable"):
            ended = ended._replace(void=s.void | {token})
        else:
            # The session is back as well: the target was started anew.
            ended = ended._replace(session=s.session)
        return say(ended, "aborted", token)

    def _faults(self, s: State) -> Iterator[Step]:
        for message in s.network:
            yield f"{message} is lost", s._replace(network=s.network - {message})
        if s.sender.at != "off" and s.thread.at == "off":
            yield "the sender is killed", self._end(s, "sender")
        if s.thread.at != "off":
            killed = self._end(s, "sender") if s.sender.at != "off" else s
            yield "the sender with its thread is killed", self._end(killed, "thread")
        if s.resolver.at != "off":
            yield "resolve is killed", self._end(s, "resolver")
        if s.session is not None:
            yield "the target is killed", s._replace(session=None)
        yield from self._remount(s)
        if s.mounted or s.mounting:
            lost = s._replace(
                mounted=False, mounting="", gate=False, fence=False, begun=False, lease=""
            )
            lost = lost._replace(sender=Process(), resolver=Process(), thread=Process())
            if self._is("committing is not synced"):
                kept = tuple(("none", 0) if r[0] == "committing" else r for r in s.records)
                lost = lost._replace(records=kept)
            yield "the source's host dies", lost
        else:
            fence = record_of(s)[0] != "none" and not self._is("a mount ignores the record")
            yield "it is mounted again", s._replace(mounted=True, fence=fence)

    def _remount(self, s: State) -> Iterator[Step]:
        """Unmounted and mounted again while whoever used the mount lives; `fusedisk.mounting`."""
        gone = s._replace(mounted=False, gate=False, begun=False)
        seen = record_of(s)[0] != "none" and not self._is("a mount ignores the record")
        if self._is("a mount looks for a record first"):
            if s.mounted:
                yield "a mount looks for a record", gone._replace(mounting=f"looked, {seen}")
            elif s.mounting:
                fence = s.mounting == "looked, True"
                yield "it publishes its control", self._published(s, fence)._replace(mounted=True)
        elif s.mounted:
            new = self._published(gone, False)._replace(mounting="published")
            yield "a mount publishes its control", new
        elif s.mounting:
            yield "it looks for a record", s._replace(mounted=True, mounting="", fence=seen)

    @staticmethod
    def _published(s: State, fence: bool) -> State:
        def known(p: Process) -> Process:
            return p._replace(stale=p.at != "off")

        processes = {"sender": known(s.sender), "resolver": known(s.resolver)}
        return s._replace(mounting="", gate=False, fence=fence, **processes)

    # --- invariants ----------------------------------------------------------------------------

    def check(self, s: State) -> str | None:
        """What does not hold in this state; None where all does."""
        if writable(s) and s.promoted is not None:
            return "both sides are writable"
        if s.promoted not in (None, FORCED) and s.written:
            return "the replica lacks what was written"
        if s.promoted in s.void:
            return "a void token promoted the replica"
        if s.mounted and not s.gate and s.fence and s.promoted is None:
            kind, _ = record_of(s)
            if kind == "fenced":
                return "the source is fenced, and nobody is the disk"
        if s.mounted and not s.lease and not self._resolve_settles(s):
            return "resolve does not settle it"
        return None

    def _resolve_settles(self, s: State) -> bool:
        """Server and resolver run to their end, nothing is lost; exactly one side is writable."""
        s = s._replace(network=frozenset())
        for _ in range(30):
            step = next(self._server(s), None) or self._next_settling(s)
            if step is None:
                break
            s = step[1]
        return writable(s) != (s.promoted is not None)

    def _next_settling(self, s: State) -> Step | None:
        asks = [step for step in self._target(s) if step[0] == "the target is asked"]
        if asks:
            return asks[0]
        found = list(self._resolver(s))
        # Asking comes first; an answer that is there is heard before asking again.
        return found[-1] if found else None


def explore(mutation: str = "") -> int:
    """Visit every reachable state; their number. Raises Violation with the shortest way there."""
    model, start = Model(mutation), State()
    came: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        broken = model.check(state)
        if broken is not None:
            raise Violation(f"{broken}: " + "; ".join(_way(came, state)))
        for name, following in model.steps(state):
            if following not in came:
                came[following] = state, name
                queue.append(following)
    return len(came)


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names: list[str] = []
    while (step := came[state]) is not None:
        state, name = step
        names.append(name)
    return names[::-1]
