--------------------------------- MODULE Group ---------------------------------
(* The tensor ranks of one decode replica, which must decide alike: the twin of sim/explorer/group.py.

   Two ranks; 0 leads. Each learns the way to each request by itself, at its own time (the late mapping of
   sglang#21299), keeps its own queue and its own pages, and talks to a prefill rank of its own. What they decide, they
   decide from what they exchange in collectives: a rank enters one and stays in it until the other has entered.
   Two that enter different ones never come out again.

   One action for each move of the Python model, under the same name. Faults cost budget. A deadline is patient: it
   passes when no step can be taken, or early, which is a fault ("slowness").

   How to read it: the variables; then what a rank does to its own record (a "pen" writes it, together with everything
   that an order touches); then what ranks say and conclude; then one action a move; then what must hold. *)
EXTENDS Machine

CONSTANTS
  Requests,  \* their names, such as {"q1", "q2"}
  RoomOf,    \* the room number of each
  Pages,     \* how many pages each rank has; a request needs one
  Faults     \* how many faults of each kind may come, and in "total": [slowness |-> 1, total |-> 1]

VARIABLES
  router,      \* for each request [state, cause]; "Unsent" before it is dispatched
  answers,     \* what the leader has told the router, in order: <<"FirstToken", q>>, <<"Failed", q, cause>>
  rank,        \* for each rank a record, see FreshRank
  prefill,     \* for each rank and request, what its prefill rank knows: [state, asked]
  woken,       \* is one more turn wanted?
  collective,  \* the one at hand, as in Machine
  payload,     \* <<kind, what>> that the rank that stands in it has brought; <<>> if there is none
  faults       \* what is left of the budget

VARIABLE history  \* what has happened, for the invariants; no action looks at it

Protocol == <<router, answers, rank, prefill, woken, collective, payload, faults>>
vars == <<router, answers, rank, prefill, woken, collective, payload, faults, history>>

Ranks == {0, 1}
Leader == 0
Own(q) == <<RoomOf[q], 0, 0>>
DeadlineNames == {"bootstrap", "admission", "waiting", "drain"}

\* Polls on which no scheduler acts, so that nobody is woken for them.
NothingToDo == {"Absent", "Announced", "Bootstrapping", "Transferring", "Retired"}
Live == {"Bootstrapping", "WaitingForInput"}
PollNumber == [Failed |-> 0, Bootstrapping |-> 1, WaitingForInput |-> 2, Transferring |-> 3, Success |-> 4]
NumberOf(poll) == IF poll \in DOMAIN PollNumber THEN PollNumber[poll] ELSE 0

Min(a, b) == IF a < b THEN a ELSE b

RECURSIVE Without(_, _)
Without(sequence, each) ==
  IF sequence = <<>> THEN <<>>
  ELSE IF Head(sequence) = each THEN Without(Tail(sequence), each)
  ELSE <<Head(sequence)>> \o Without(Tail(sequence), each)

Range(sequence) == {sequence[k] : k \in DOMAIN sequence}

\* An equal message that is already under way stands for both.
Send(channel, message) == IF message \in Range(channel) THEN channel ELSE Append(channel, message)

\* ------------------------------------------------------------------------------------------ the first state

\* A turn. stage: the collective entered last. waiting: still in it. commands, merged, memory: what is agreed so far.
\* mine, queue: what this rank says, and in which order (only by_position has to remember them).
NoTurn == [stage |-> "None", waiting |-> FALSE, commands |-> <<>>, merged |-> {}, memory |-> <<>>, mine |-> {},
           queue |-> <<>>]

\* entries: "None" unless the rank has been told to open the request; "Unqueued" until it joins the queue.
\* order: the queue. page: <<>> or <<number>>. filled: whose page prefill has written. routed: whose way is known.
FreshRank == [
  rooms |-> [q \in Requests |-> Absent(Own(q))], timers |-> {},
  entries |-> [q \in Requests |-> [state |-> "None", aborted |-> ""]], order |-> <<>>,
  page |-> [q \in Requests |-> <<>>], filled |-> {}, routed |-> {}, stopped |-> FALSE,
  commands |-> <<>>, turn |-> NoTurn]

Init ==
  /\ router = [q \in Requests |-> [state |-> "Unsent", cause |-> "None"]]
  /\ answers = <<>>
  /\ rank = [i \in Ranks |-> FreshRank]
  /\ prefill = [i \in Ranks |-> [q \in Requests |-> [state |-> "None", asked |-> FALSE]]]
  /\ woken = FALSE
  /\ collective = Start("collective")
  /\ payload = <<>>
  /\ faults = Faults
  /\ history = [
       broken |-> {},                                          \* invariants that a single event has broken
       decided |-> [i \in Ranks |-> <<>>],                     \* <<q, outcome>> in the order of each rank
       committed |-> [i \in Ranks |-> {}],                     \* before the client was answered
       causes |-> [i \in Ranks |-> [q \in Requests |-> <<>>]],  \* the first cause seen before that, if any
       met |-> [i \in Ranks |-> [q \in Requests |-> "no"]]]    \* "no", "opened", "ended"

\* --------------------------------------------------------- the pen: what a rank does to itself and around it

Pen(i) == [index |-> i, r |-> rank[i], prefill |-> prefill[i], answers |-> answers, woken |-> woken,
           legal |-> TRUE, failing |-> FALSE, history |-> history]

Write(p) ==
  /\ rank' = [rank EXCEPT ![p.index] = p.r]
  /\ prefill' = [prefill EXCEPT ![p.index] = p.prefill]
  /\ answers' = p.answers
  /\ woken' = p.woken
  /\ history' = p.history

Wake(p) == [p EXCEPT !.woken = TRUE]

\* The leader tells the router.
Answer(p, message) == IF p.index = Leader THEN [p EXCEPT !.answers = Send(@, message)] ELSE p

Release(p, q) ==
  IF p.r.page[q] = <<>> THEN p
  ELSE [p EXCEPT !.r.page[q] = <<>>, !.r.filled = @ \ {q}, !.woken = TRUE]

Free(r) == (0 .. Pages - 1) \ {r.page[q][1] : q \in {each \in Requests : r.page[each] # <<>>}}

Reserve(p, q) ==
  LET free == Free(p.r)
  IN [p EXCEPT !.r.page[q] = <<CHOOSE page \in free : \A other \in free : page <= other>>]

\* Destination pages reach prefill at once; what it answers, and when, is its own business.
Told(state) == CASE state = "waiting" -> "writing" [] state = "failed" -> "failing" [] OTHER -> state
Publish(p, q) ==
  IF q \in p.r.routed /\ p.r.page[q] # <<>> THEN [p EXCEPT !.prefill[q].state = Told(@)] ELSE p

CarryOutOrder(p, q, name, argument) ==
  CASE name = "ArmDeadline" /\ argument # <<"tombstone">> -> [p EXCEPT !.r.timers = @ \union {<<q, argument[1]>>}]
    [] name = "CancelDeadline" -> [p EXCEPT !.r.timers = @ \ {<<q, argument[1]>>}]
    [] name = "ReleasePages" -> Release(p, q)
    [] name = "NotifyPrefill" -> IF q \in p.r.routed THEN [p EXCEPT !.prefill[q].asked = TRUE] ELSE p
    [] name = "SendMetadata" -> Publish(p, q)
    [] OTHER -> p  \* tombstones outlive every message; quarantined pages simply stay where they are

RECURSIVE CarryOutOrders(_, _, _)
CarryOutOrders(p, q, actions) ==
  IF actions = <<>> THEN p
  ELSE CarryOutOrders(CarryOutOrder(p, q, Head(actions)[1], Head(actions)[3]), q, Tail(actions))

\* What the invariants have to know of a change of poll.
GoesBack(before, after) ==
  /\ before # after
  /\ after \in DOMAIN PollNumber
  /\ before \in {"Success", "Failed"} \/ (after # "Failed" /\ NumberOf(after) < NumberOf(before))
Ends(before, after) ==
  before # after /\ (after \in {"Success", "Failed", "Retired"} \/ (after = "Absent" /\ before \in DOMAIN PollNumber))

Remember(h, i, q, before, after, cause) ==
  LET wentBack == IF GoesBack(before, after) THEN [h EXCEPT !.broken = @ \union {"S3"}] ELSE h
      failed == IF after = "Failed" /\ before # after /\ h.causes[i][q] = <<>> /\ router[q].state # "Answered"
                THEN [wentBack EXCEPT !.causes[i][q] = <<cause>>] ELSE wentBack
  IN IF Ends(before, after) THEN [failed EXCEPT !.met[i][q] = "ended"]
     ELSE IF before # after /\ after \in Live /\ h.met[i][q] = "no" THEN [failed EXCEPT !.met[i][q] = "opened"]
     ELSE failed

\* A legal step of a room, with everything that it orders.
Receive(p, q, step) ==
  LET before == p.r.rooms[q].local
      after == step.room.local
      forgotten == IF after.poll = "Absent" THEN p.r.routed \ {q} ELSE p.r.routed
      moved == [p EXCEPT !.r.rooms[q] = step.room, !.r.routed = forgotten,
                  !.history = Remember(@, p.index, q, before.poll, after.poll, after.cause)]
      ordered == CarryOutOrders(moved, q, step.actions)
  IN IF after.poll # before.poll /\ after.poll \notin NothingToDo THEN Wake(ordered) ELSE ordered

\* Offer a fact to the room of a request. p.legal says afterwards whether the table allowed it.
Deliver(p, fact, q, detail) ==
  LET StepOf(kind, about) == StepRoom("receiver", p.r.rooms[q], kind, Own(q), about)
      step == StepOf(fact, detail)
      told == [p EXCEPT !.legal = FALSE, !.history.broken = @ \union {"S10"}]
  IN IF ~step.illegal THEN [Receive(p, q, step) EXCEPT !.legal = TRUE]
     ELSE IF Rules.illegal_fact = "stops_scheduler" THEN [told EXCEPT !.r.stopped = TRUE]
     ELSE Receive(told, q, StepOf("AbortRequested", <<"illegal_fact">>))

PollOf(p, q) == p.r.rooms[q].local.poll

\* ------------------------------------------------------------------------- the scheduler: entries and commands

Queued == {"Preallocation", "Transfer"}

\* A request moves on in the rank's scheduler.
Advance(p, q, fact) ==
  LET before == p.r.entries[q]
      from == IF before.state = "None" THEN "Unqueued" ELSE before.state
      to == Step("decode_request", [state |-> from], fact, <<>>).state.state
      entry == IF to = "Done" THEN [state |-> "None", aborted |-> ""] ELSE [before EXCEPT !.state = to]
      order == IF to \notin Queued THEN Without(p.r.order, q)
               ELSE IF q \in Range(p.r.order) THEN p.r.order ELSE Append(p.r.order, q)
  IN [p EXCEPT !.r.entries[q] = entry, !.r.order = order]

\* The set-up call has returned: the request joins the queue, unless it has long been in it.
Join(p, q) == IF p.r.entries[q].state = "Unqueued" THEN Wake(Advance(p, q, "RequestArrived")) ELSE p

Open(p, q) ==
  LET known == [p EXCEPT !.r.entries[q].state = "Unqueued"]
      queued == IF Rules.decode_enqueue = "at_arrival" THEN Advance(known, q, "RequestArrived") ELSE known
  IN Deliver(queued, "RequestOpened", q, <<>>)

\* The pages belong to the request since its commit; they go back with its token or its abort.
End(p, q, fact) == Release(Advance(p, q, fact), q)

GiveUp(p, q, cause) ==
  LET cleared == Deliver(Deliver(p, "AbortRequested", q, <<cause>>), "Cleared", q, <<>>)
  IN Answer([cleared EXCEPT !.r.entries[q] = [state |-> "None", aborted |-> ""]], <<"Failed", q, cause>>)

Abort(p, q, cause) ==
  LET state == p.r.entries[q].state
      noted == [p EXCEPT !.r.entries[q].aborted = IF @ = "" THEN cause ELSE @]
  IN CASE state = "None" -> p
       [] state = "Unqueued" -> GiveUp(p, q, cause)
       [] state = "Running" -> End(p, q, "DropAgreed")
       [] OTHER -> Deliver(noted, "AbortRequested", q, <<cause>>)

Obey(p, command) ==
  LET q == command[2]
  IN CASE command[1] = "open" -> Open(p, q)
       [] command[1] = "abort" -> Abort(p, q, command[3])
       [] command[1] = "generated" ->
            IF p.r.entries[q].state = "Running"
            THEN Answer(End(p, q, "GenerationFinished"), <<"FirstToken", q>>) ELSE p

RECURSIVE ObeyAll(_, _)
ObeyAll(p, commands) == IF commands = <<>> THEN p ELSE ObeyAll(Obey(p, Head(commands)), Tail(commands))

\* ------------------------------------------------------------------------------ what a rank says: reports, memory

\* A report is <<q, poll, cause>>. A request that was given up is Failed whatever its room says.
GivenUp(entry, report) ==
  IF entry.aborted = "" \/ report[2] = 0 THEN report ELSE <<report[1], 0, entry.aborted>>

Report(r, q) ==
  LET local == r.rooms[q].local
  IN GivenUp(r.entries[q], IF local.poll = "Absent" THEN <<q, 0, "room_lost">>
                           ELSE <<q, NumberOf(local.poll), local.cause>>)

Reports(r) == {Report(r, q) : q \in Range(r.order)}

About(reports, q) == {report \in reports : report[1] = q}  \* one or none
The(set) == CHOOSE each \in set : TRUE

\* <<pages, rows, slots>> left; every request fits into the running batch.
Memory(r) ==
  LET free == Cardinality(Free(r))
      taken == Cardinality({q \in Requests : r.entries[q].state \in {"Transfer", "Running"}})
  IN <<free, free, Cardinality(Requests) - taken>>

\* ----------------------------------------------------------------------- what ranks conclude (agreement.py)

\* by_request_id: minimum over the ranks that know it; who does not know it holds it in Bootstrapping. Only requests
\* that the leader knows count. Of equals the leader's is taken.
MergeByRequest(first, second) ==
  {LET theirs == About(second, report[1])
       other == IF theirs = {} THEN <<report[1], 1, "None">> ELSE The(theirs)
   IN IF other[2] < report[2] THEN other ELSE report : report \in first}

\* by_position: element k of each rank, whatever request each of them means by k. The cause is the rank's own.
MergeByPosition(queue, mine, first, second) ==
  {<<queue[k], Min(first[k], second[k]), The(About(mine, queue[k]))[3]>> : k \in 1 .. Min(Len(first), Len(second))}

Tightest(one, other) == [k \in 1 .. 3 |-> Min(one[k], other[k])]

\* A decision is <<q, outcome, cause>>; none is <<>>.
DecideBootstrap(report) ==
  IF report[2] = 0 THEN <<report[1], "drop", report[3]>>
  ELSE IF report[2] >= 2 THEN <<report[1], "admit", "None">> ELSE <<>>
DecideTransfer(report) ==
  IF report[2] = 0 THEN <<report[1], "drop", report[3]>>
  ELSE IF report[2] = 4 THEN <<report[1], "conclude", "None">> ELSE <<>>

Decision(r, q, merged) ==
  LET found == About(merged, q)
      entry == r.entries[q]
      report == IF found = {} THEN <<q, 0, entry.aborted>> ELSE GivenUp(entry, The(found))
  IN IF (found = {} /\ entry.aborted = "") \/ report[2] = 1 THEN <<>>
     ELSE IF entry.state = "Transfer" THEN DecideTransfer(report)
     ELSE IF report[2] = 0 THEN DecideBootstrap(report) ELSE <<>>

\* In the order of the rank's own queue.
RECURSIVE Decisions(_, _, _)
Decisions(r, order, merged) ==
  IF order = <<>> THEN <<>>
  ELSE LET decision == Decision(r, Head(order), merged)
       IN (IF decision = <<>> THEN <<>> ELSE <<decision>>) \o Decisions(r, Tail(order), merged)

Fits(memory) == memory[1] >= 1 /\ memory[2] >= 1 /\ memory[3] >= 1

\* Memory is granted in order of arrival; the first that does not fit holds the rest.
RECURSIVE Admissions(_, _, _, _)
Admissions(r, order, merged, memory) ==
  IF order = <<>> THEN <<>>
  ELSE LET q == Head(order)
           found == About(merged, q)
           wants == r.entries[q].state = "Preallocation" /\ found # {} /\ DecideBootstrap(The(found)) # <<>>
       IN IF ~wants THEN Admissions(r, Tail(order), merged, memory)
          ELSE IF ~Fits(memory) THEN <<>>
          ELSE <<q>> \o Admissions(r, Tail(order), merged, [k \in 1 .. 3 |-> memory[k] - 1])

\* ------------------------------------------------------------------------------------------- the end of a turn

Decide(p, q, outcome) == [p EXCEPT !.history.decided[p.index] = Append(@, <<q, outcome>>)]

Drop(p, q, cause) ==
  LET gone == Advance(p, q, "DropAgreed")
      failed == IF PollOf(gone, q) \in {"Failed", "Retired"} THEN gone
                ELSE Deliver(gone, "AbortRequested", q, <<cause>>)
      \* Without a room there is nothing to clear.
      cleared == IF PollOf(p, q) = "Absent" THEN gone ELSE Deliver(failed, "Cleared", q, <<>>)
  IN Answer(cleared, <<"Failed", q, cause>>)

Commit(p, q) ==
  LET isFirst == router[q].state # "Answered"
      noted == [p EXCEPT !.history.broken = IF q \in p.r.filled THEN @ ELSE @ \union {"S5"},
                         !.history.committed[p.index] = IF isFirst THEN @ \union {q} ELSE @]
  IN Deliver(Advance(noted, q, "TransferAgreed"), "Cleared", q, <<>>)

Execute(p, decision) ==
  LET told == Decide(p, decision[1], decision[2])
  IN IF decision[2] = "drop"
     THEN Drop(told, decision[1], IF decision[3] = "None" THEN "failed" ELSE decision[3])
     ELSE Commit(told, decision[1])

RECURSIVE ApplyAll(_, _)
ApplyAll(p, decisions) == IF decisions = <<>> THEN p ELSE ApplyAll(Execute(p, Head(decisions)), Tail(decisions))

\* Pages and row for a request, and prefill is told where they are. p.failing: the first attempt finds no memory.
Grant(p, q) ==
  LET admitted == Advance(Decide(p, q, "admit"), q, "MemoryGranted")
      reserved == Deliver(Reserve(admitted, q), "PagesReserved", q, <<>>)
      exposed == Deliver(reserved, "MetadataSent", q, <<>>)
  IN IF PollOf(admitted, q) # "WaitingForInput" THEN admitted  \* failed since; the next turn drops it everywhere
     ELSE IF p.failing \/ Free(admitted.r) = {}
     THEN Deliver([admitted EXCEPT !.failing = FALSE], "AbortRequested", q, <<"allocation_failed">>)
     ELSE IF ~reserved.legal THEN reserved
     ELSE IF ~exposed.legal THEN exposed ELSE Publish(exposed, q)

RECURSIVE GrantAll(_, _)
GrantAll(p, list) ==
  IF list = <<>> THEN p
  ELSE LET granted == Grant(p, Head(list)) IN IF granted.r.stopped THEN granted ELSE GrantAll(granted, Tail(list))

EndTurn(p) ==
  LET turn == p.r.turn
      obeyed == ObeyAll([p EXCEPT !.r.turn = NoTurn], turn.commands)
      applied == ApplyAll(obeyed, Decisions(obeyed.r, obeyed.r.order, turn.merged))
  IN GrantAll(applied, Admissions(applied.r, applied.r.order, turn.merged, turn.memory))

\* ---------------------------------------------------------------------------------------------- collectives

Knows(reports) == {report[1] : report \in reports}
QueueOf(r, kind) ==
  LET IsIn(q) == r.entries[q].state = kind /\ q \in Knows(r.turn.mine) IN SelectSeq(r.order, IsIn)

\* <<kind, queue>> of the collective that a rank enters next in its turn; <<>> when it has been in all of them.
NextCollective(r) ==
  LET stage == r.turn.stage
      first == QueueOf(r, "Preallocation")
      second == QueueOf(r, "Transfer")
  IN CASE stage = "None" -> <<IF Rules.agreement = "by_request_id" THEN "step" ELSE "requests", <<>>>>
       [] stage = "requests" /\ first # <<>> -> <<"Preallocation", first>>
       [] stage \in {"requests", "Preallocation"} /\ second # <<>> -> <<"Transfer", second>>
       [] OTHER -> <<>>

\* Its turn can end: it has been in every collective.
IsReady(r) == r.turn.stage # "None" /\ ~r.turn.waiting /\ NextCollective(r) = <<>>

\* What a rank brings, and the turn in which it then stands.
Brought(r, kind, queue) ==
  CASE kind = "step" -> <<r.commands, Reports(r), Memory(r)>>
    [] kind = "requests" -> r.commands
    [] OTHER -> [k \in 1 .. Len(queue) |-> The(About(r.turn.mine, queue[k]))[2]]
ShapeOf(kind, queue) == IF kind \in {"step", "requests"} THEN <<kind, "fixed">> ELSE <<kind, Len(queue)>>
Entered(r, kind, queue) ==
  LET standing == [NoTurn EXCEPT !.stage = kind, !.waiting = TRUE]
  IN CASE kind = "step" -> [r EXCEPT !.commands = <<>>, !.turn = standing]
       [] kind = "requests" ->
            [r EXCEPT !.commands = <<>>, !.turn = [standing EXCEPT !.memory = Memory(r), !.mine = Reports(r)]]
       [] OTHER -> [r EXCEPT !.turn.stage = kind, !.turn.waiting = TRUE, !.turn.queue = queue]

\* The collective is complete; `brought` is what each rank had.
Completed(turn, brought) ==
  LET out == [turn EXCEPT !.waiting = FALSE]
  IN CASE turn.stage = "step" ->
            [out EXCEPT !.commands = brought[0][1], !.merged = MergeByRequest(brought[0][2], brought[1][2]),
                        !.memory = Tightest(brought[0][3], brought[1][3])]
       [] turn.stage = "requests" -> [out EXCEPT !.commands = brought[0]]
       [] OTHER -> [out EXCEPT !.queue = <<>>,
                      !.merged = @ \union MergeByPosition(turn.queue, turn.mine, brought[0], brought[1])]

\* A turn that would change nothing ends at once.
ChangesNothing(r) ==
  /\ r.turn.commands = <<>>
  /\ Decisions(r, r.order, r.turn.merged) = <<>>
  /\ Admissions(r, r.order, r.turn.merged, r.turn.memory) = <<>>
GoOn(r, brought) ==
  LET after == [r EXCEPT !.turn = Completed(@, brought)]
  IN IF ~IsReady(after) THEN after
     ELSE IF ChangesNothing(after) THEN [after EXCEPT !.turn = NoTurn] ELSE after

\* ---------------------------------------------------------------------------------------------- faults

CanSpend(kind) == kind \in DOMAIN faults /\ faults[kind] > 0 /\ faults.total > 0
Spend(kind) == faults' = [faults EXCEPT ![kind] = @ - 1, !.total = @ - 1]
Spare == UNCHANGED faults

\* ---------------------------------------------------------------------------------------------- the router

Command(i, command) == [rank EXCEPT ![Leader].commands = Send(@, command)]

CanDispatch(q) == router[q].state = "Unsent"
Dispatch(q) ==
  /\ CanDispatch(q)
  /\ router' = [router EXCEPT ![q] = Start("router")]
  /\ rank' = Command(Leader, <<"open", q>>)
  /\ prefill' = [i \in Ranks |-> [prefill[i] EXCEPT ![q].state = "waiting"]]
  /\ woken' = TRUE
  /\ UNCHANGED <<answers, collective, payload, history>> /\ Spare

Roomless == {"engine_crashed", "connection_refused", "client_left", "room_in_use"}
Causes(q) == UNION {Range(history.causes[i][q]) : i \in Ranks}
IsTrue(q, ok, cause) ==
  IF ok THEN Causes(q) = {} /\ \A i \in Ranks : q \in history.committed[i]
  ELSE Causes(q) = {} \/ cause \in Causes(q) \/ cause \in Roomless

\* The router hears something of a request.
Route(q, fact, detail) ==
  LET step == Step("router", router[q], fact, detail)
      Is(order, name) == order[1] = name
      cancels == \E k \in DOMAIN step.orders :
                   step.orders[k][1] = "CancelLeg" /\ step.orders[k][2] # <<"prefill">>
      told == {step.orders[k][2][1] : k \in {each \in DOMAIN step.orders : Is(step.orders[each], "AnswerClient")}}
      cause == IF step.state.cause = "None" THEN "cancelled" ELSE step.state.cause
      lies == \E outcome \in told : ~IsTrue(q, outcome = "ok", step.state.cause)
  IN /\ router' = [router EXCEPT ![q] = step.state]
     /\ rank' = IF cancels THEN Command(Leader, <<"abort", q, cause>>) ELSE rank
     /\ woken' = (woken \/ cancels)
     /\ history' = IF lies THEN [history EXCEPT !.broken = @ \union {"S9"}] ELSE history
     /\ UNCHANGED <<prefill, collective, payload>>

CanHear == answers # <<>>
HearLeader ==
  /\ CanHear
  /\ LET message == Head(answers)
     IN IF message[1] = "FirstToken" THEN Route(message[2], "DecodeAnswered", <<>>)
        ELSE Route(message[2], "LegFailed", <<"decode", message[3]>>)
  /\ answers' = Tail(answers) /\ Spare

\* Prefill's own leg ends some time after decode's; a router that waits for both hears of it then.
CanLosePrefill(q) == router[q].state = "HalfFailed"
LosePrefill(q) ==
  /\ CanLosePrefill(q)
  /\ Route(q, "LegFailed", <<"prefill", "aborted_by_decode">>)
  /\ UNCHANGED answers /\ Spare

ClientLeaves(q) ==
  /\ router[q].state \notin {"Unsent", "Answered"}
  /\ CanSpend("client_abort") /\ Spend("client_abort")
  /\ Route(q, "ClientLeft", <<>>)
  /\ UNCHANGED answers

\* ------------------------------------------------------------------------------------------ the abstract prefill

\* Prefill gives a request up on every rank that has not written it yet.
PrefillFails(q) ==
  /\ CanSpend("prefill_abort") /\ Spend("prefill_abort")
  /\ \E i \in Ranks : prefill[i][q].state \in {"waiting", "writing"}
  /\ prefill' = [i \in Ranks |-> [prefill[i] EXCEPT ![q].state =
       CASE @ = "waiting" -> "failed" [] @ = "writing" -> "failing" [] OTHER -> @]]
  /\ UNCHANGED <<router, answers, rank, woken, collective, payload, history>>

\* It has written the pages, or has failed, and says so. An abort is answered before anything else.
CanAnswer(i, q) == ~prefill[i][q].asked /\ prefill[i][q].state \in {"writing", "failing"}
PrefillAnswers(i, q) ==
  /\ CanAnswer(i, q)
  /\ LET isWritten == prefill[i][q].state = "writing"
         over == [Pen(i) EXCEPT !.prefill[q].state = "over"]
         filled == IF isWritten /\ over.r.page[q] # <<>> THEN [over EXCEPT !.r.filled = @ \union {q}] ELSE over
         outcome == IF isWritten THEN "Success" ELSE "Failed"
     IN Write(IF filled.r.stopped THEN filled ELSE Deliver(filled, "StatusReceived", q, <<0, outcome>>))
  /\ UNCHANGED <<router, collective, payload>> /\ Spare

CanAcknowledge(i, q) == prefill[i][q].asked
PrefillAcknowledges(i, q) ==
  /\ CanAcknowledge(i, q)
  /\ LET over == [Pen(i) EXCEPT !.prefill[q] = [state |-> "over", asked |-> FALSE]]
     IN Write(IF over.r.stopped THEN over ELSE Deliver(over, "AbortAcknowledged", q, <<0>>))
  /\ UNCHANGED <<router, collective, payload>> /\ Spare

\* ---------------------------------------------------------------------------------------------- the ranks

\* Begin a turn, or go on in it: enter the next collective and wait, unless the other is already there. A turn begins
\* when something has changed, or when the other waits.
CanEnter(i) ==
  LET turn == rank[i].turn
  IN /\ ~rank[i].stopped /\ collective.state = "Open" /\ ~turn.waiting
     /\ turn.stage = "None" => woken \/ collective.entered # {}
     /\ NextCollective(rank[i]) # <<>>
Enter(i) ==
  /\ CanEnter(i)
  /\ LET r == rank[i]
         next == NextCollective(r)
         isBeginning == r.turn.stage = "None" /\ collective.entered = {}
         mine == Brought(r, next[1], next[2])
         entered == [rank EXCEPT ![i] = Entered(r, next[1], next[2])]
         step == Step("collective", collective, "RankEntered", <<i, 2, ShapeOf(next[1], next[2])>>)
         isComplete == step.state.state = "Complete"
         brought == [j \in Ranks |-> IF j = i THEN mine ELSE payload[2]]
     IN /\ woken' = (woken /\ ~isBeginning)
        /\ collective' = IF isComplete THEN Start("collective") ELSE step.state
        /\ payload' = IF step.state.state = "Open" THEN <<next[1], mine>> ELSE <<>>
        /\ rank' = IF isComplete THEN [j \in Ranks |-> GoOn(entered[j], brought)] ELSE entered
  /\ UNCHANGED <<router, answers, prefill, history>> /\ Spare

CanCarryOut(i) == ~rank[i].stopped /\ IsReady(rank[i])
CarryOut(i) ==
  /\ CanCarryOut(i)
  /\ Write(EndTurn(Pen(i)))
  /\ UNCHANGED <<router, collective, payload>> /\ Spare

CarryOutWithoutMemory(i) ==
  /\ CanCarryOut(i) /\ CanSpend("allocation_failure")
  /\ LET after == EndTurn([Pen(i) EXCEPT !.failing = TRUE])
     IN ~after.failing /\ Write(after)
  /\ Spend("allocation_failure")
  /\ UNCHANGED <<router, collective, payload>>

\* The server has told this rank who runs the request, or it could not. Then the set-up call returns.
CanLearn(i, q) ==
  ~rank[i].stopped /\ rank[i].entries[q].state # "None" /\ rank[i].rooms[q].local.poll = "Bootstrapping"
Learn(i, q) ==
  /\ CanLearn(i, q)
  /\ LET p == [Pen(i) EXCEPT !.r.routed = @ \union {q}]
     IN Write(Join(Deliver(Deliver(p, "RoutesResolved", q, <<{0}, 1>>), "SetupFinished", q, <<>>), q))
  /\ UNCHANGED <<router, collective, payload>> /\ Spare

FindNoWay(i, q) ==
  /\ CanLearn(i, q) /\ CanSpend("route_failure") /\ Spend("route_failure")
  /\ Write(Join(Deliver(Deliver(Pen(i), "RouteUnavailable", q, <<"route_404">>), "SetupFinished", q, <<>>), q))
  /\ UNCHANGED <<router, collective, payload>>

\* The forward pass of a running request is over; the leader shares that in its next turn.
CanGenerate(q) ==
  LET r == rank[Leader]
  IN /\ ~r.stopped /\ r.turn.stage = "None"
     /\ r.entries[q].state = "Running" /\ <<"generated", q>> \notin Range(r.commands)
Generate(q) ==
  /\ CanGenerate(q)
  /\ rank' = [rank EXCEPT ![Leader].commands = Append(@, <<"generated", q>>)]
  /\ woken' = TRUE
  /\ UNCHANGED <<router, answers, prefill, collective, payload, history>> /\ Spare

\* ---------------------------------------------------------------------------------------------- deadlines

Ring(i, name) ==
  /\ ~rank[i].stopped
  /\ \E timer \in rank[i].timers :
       /\ timer[2] = name
       /\ Write(Deliver([Pen(i) EXCEPT !.r.timers = @ \ {timer}], "DeadlineReached", timer[1], <<name>>))
  /\ UNCHANGED <<router, collective, payload>>

StepEnabled ==
  \/ CanHear
  \/ \E q \in Requests : CanDispatch(q) \/ CanLosePrefill(q) \/ CanGenerate(q)
  \/ \E i \in Ranks : CanEnter(i) \/ CanCarryOut(i)
  \/ \E i \in Ranks, q \in Requests : CanAnswer(i, q) \/ CanAcknowledge(i, q) \/ CanLearn(i, q)

PassDeadline(i, name) == ~StepEnabled /\ Ring(i, name) /\ Spare
PassDeadlineEarly(i, name) == CanSpend("slowness") /\ Spend("slowness") /\ Ring(i, name)

\* ---------------------------------------------------------------------------------------------- behaviours

\* The protocol's own moves; they are owed.
Owed ==
  \/ HearLeader
  \/ \E q \in Requests : Dispatch(q) \/ LosePrefill(q) \/ Generate(q)
  \/ \E i \in Ranks : Enter(i) \/ CarryOut(i)
  \/ \E i \in Ranks, q \in Requests : PrefillAnswers(i, q) \/ PrefillAcknowledges(i, q) \/ Learn(i, q)
  \/ \E i \in Ranks, name \in DeadlineNames : PassDeadline(i, name)

\* The environment's; nobody owes a fault.
Fault ==
  \/ \E q \in Requests : ClientLeaves(q) \/ PrefillFails(q)
  \/ \E i \in Ranks : CarryOutWithoutMemory(i)
  \/ \E i \in Ranks, q \in Requests : FindNoWay(i, q)
  \/ \E i \in Ranks, name \in DeadlineNames : PassDeadlineEarly(i, name)

Next == Owed \/ Fault

\* WF_vars(Owed), written out: ENABLED Owed is said by OwedEnabled, because TLC takes ages to find it out for itself.
\* No state of this module ever comes back (the explorer finds its graph to be acyclic), so nothing can be put off for
\* ever while other moves are taken: that something happens while something is owed is as much as fairness to each move.
OwedEnabled == StepEnabled \/ \E i \in Ranks : ~rank[i].stopped /\ rank[i].timers # {}
Fairness == []<>~OwedEnabled \/ []<><<Owed>>_vars

Safety == Init /\ [][Next]_vars
Spec == Safety /\ Fairness

\* ---------------------------------------------------------------------------------------------- what must hold

\* S3 sticky-terminal: no room leaves Success or Failed for another poll, and none goes back.
S3 == "S3" \notin history.broken

\* S5 complete-success: nobody decodes from pages that prefill has not filled.
S5 == "S5" \notin history.broken

\* S7 rank-agreement: all ranks enter the same collectives, and decide the same things in the same order.
S7 ==
  /\ collective.state # "Mismatched"
  /\ \A k \in 1 .. Min(Len(history.decided[0]), Len(history.decided[1])) :
       history.decided[0][k] = history.decided[1][k]

\* S8 conservation: no page has two owners, and only a page of the pool is ever owned.
S8 ==
  \A i \in Ranks, q \in Requests :
    rank[i].page[q] # <<>> =>
      /\ rank[i].page[q][1] \in 0 .. Pages - 1
      /\ \A other \in Requests \ {q} : rank[i].page[other] # rank[i].page[q]

\* S9 truthful-result: what the client is told is so.
S9 == "S9" \notin history.broken

\* S10 containment: no room is offered an illegal fact, and no scheduler stops.
S10 == "S10" \notin history.broken

\* R1 quiesce-zero: when nothing more can happen, nothing is left.
R1 ==
  ~OwedEnabled => \A i \in Ranks :
    /\ rank[i].timers = {}
    /\ \A q \in Requests :
         rank[i].rooms[q].local.poll \in {"Absent", "Retired"} /\ rank[i].entries[q].state = "None"
         /\ rank[i].page[q] = <<>>

\* L1 bounded-end: every request that was dispatched comes to an end on every rank. One that a rank has never heard of
\* need not, once the client has its answer.
HasEnded(i, q) == history.met[i][q] = "ended" \/ (history.met[i][q] = "no" /\ router[q].state = "Answered")
L1 == \A i \in Ranks, q \in Requests : (router[q].state # "Unsent") ~> HasEnded(i, q)
================================================================================
