-------------------------------- MODULE Pipeline --------------------------------
(* The stages of a prefill pipeline, which must decide alike: the twin of sim/explorer/pipeline.py.

   Stages 0 .. LastStage, one rank each. Stage 0 takes turns: it decides, hands a step on, and computes a batch. Each
   later stage follows the steps that come down the pipe, in their order. What it does with them is the rule
   pp_decision: apply stage 0's decisions by request id, or by position, or take part in a ring that agrees on what
   all find ready. Requests fail meanwhile: on one stage alone, on prefill, on decode, or by a deadline.

   One action for each move of the Python model, under the same name. Faults cost budget. A deadline is patient: it
   passes when no step can be taken, or early, which is a fault ("slowness"). What a later stage tells stage 0 is there
   at once. Which failure it was is remembered by nobody (CAUSE).

   How to read it: the variables; then what a stage does to its own record (a "pen" writes it, together with everything
   that an order touches); then how stages decide; then one action a move; then what must hold. *)
EXTENDS Machine

CONSTANTS
  Requests,    \* their names, such as {"q1", "q2"}
  RoomOf,      \* the room number of each
  LastStage,   \* the number of the last stage; 1 for two stages
  WritesLater, \* TRUE: a write ends some time after it was posted; FALSE: at once
  Faults       \* how many faults of each kind may come, and in "total": [slowness |-> 1, total |-> 1]

VARIABLES
  legs,      \* what decode knows of each request: [state, arrived, told]; state "new" before it is dispatched
  stage,     \* for each stage a record, see FreshStage
  commands,  \* what the router has told stage 0: <<"open", q>>, <<"abort", q, cause>>
  pipe,      \* the steps that are on their way to each later stage
  inbox,     \* what decode has told each stage: <<"Metadata", q>>, <<"Abort", q>>
  faults     \* what is left of the budget

VARIABLE history  \* what has happened, for the invariants; no action looks at it

Protocol == <<legs, stage, commands, pipe, inbox, faults>>
vars == <<legs, stage, commands, pipe, inbox, faults, history>>

Stages == 0 .. LastStage
Later == 1 .. LastStage
Own(q) == <<RoomOf[q], 0, 0>>
CAUSE == "failed"
DeadlineNames == {"bootstrap", "transfer", "announced"}

\* Polls on which no scheduler acts, so that nobody is told of them.
NothingToDo == {"Absent", "Announced", "Bootstrapping", "Transferring", "Retired"}
Live == {"Bootstrapping", "WaitingForInput", "Transferring"}
PollNumber == [Failed |-> 0, Bootstrapping |-> 1, WaitingForInput |-> 2, Transferring |-> 3, Success |-> 4]
NumberOf(poll) == IF poll \in DOMAIN PollNumber THEN PollNumber[poll] ELSE 0

Min(a, b) == IF a < b THEN a ELSE b
Range(sequence) == {sequence[i] : i \in DOMAIN sequence}

\* An equal message that is already under way stands for both.
Send(channel, message) == IF message \in Range(channel) THEN channel ELSE Append(channel, message)

\* Elements of a sequence that are in a set, in their order.
Those(sequence, set) == LET IsIn(each) == each \in set IN SelectSeq(sequence, IsIn)

\* ------------------------------------------------------------------------------------------ the first state

\* entries: <<request, state, was it refused a room>> in order of arrival. The last four concern stage 0 only.
\* awake: take a turn even without a decision. reports: <<stage, request, poll>>. agreed: the closed round of the ring.
\* batches: how many it has computed.
FreshStage == [
  rooms |-> [q \in Requests |-> Absent(Own(q))], timers |-> {}, entries |-> <<>>, stopped |-> FALSE,
  awake |-> FALSE, reports |-> {}, agreed |-> <<>>, batches |-> 0]

Init ==
  /\ legs = [q \in Requests |-> [state |-> "new", arrived |-> {}, told |-> FALSE]]
  /\ stage = [k \in Stages |-> FreshStage]
  /\ commands = <<>>
  /\ pipe = [k \in Later |-> <<>>]
  /\ inbox = [k \in Stages |-> <<>>]
  /\ faults = Faults
  /\ history = [
       broken |-> {},                                          \* invariants that a single event has broken
       decided |-> [k \in Stages |-> <<>>],                    \* <<q, outcome>> in the order of each stage
       entered |-> {},                                         \* <<number, batch>> of whoever went through the pipe
       failed |-> {},                                          \* requests that have failed on some stage
       met |-> [k \in Stages |-> [q \in Requests |-> "no"]]]   \* "no", "opened", "ended"

\* ------------------------------------------------------- the pen: what a stage does to itself and around it

\* told: <<q, outcome>> for decode. news: for stage 0. handed: the step for the next stage, or <<>>.
Pen(k) == [index |-> k, r |-> stage[k], told |-> <<>>, news |-> <<>>, handed |-> <<>>, history |-> history]

Position(r, q) == CHOOSE i \in DOMAIN r.entries : r.entries[i][1] = q
Has(r, q) == \E i \in DOMAIN r.entries : r.entries[i][1] = q
Entry(r, q) == r.entries[Position(r, q)]
InState(r, states) ==
  LET IsIn(entry) == entry[2] \in states
      found == SelectSeq(r.entries, IsIn)
  IN [i \in DOMAIN found |-> found[i][1]]

PollOf(r, q) == r.rooms[q].local.poll
OwnReport(r, q) == IF Entry(r, q)[3] THEN 0 ELSE NumberOf(PollOf(r, q))
Ready(r) == LET IsReady(q) == OwnReport(r, q) = 2 IN SelectSeq(InState(r, {"Bootstrap"}), IsReady)

\* ---- how the rule decides who has a say (agreement.py)

UsesRing == Rules.pp_decision \in {"consensus_good_only", "consensus_or_local_failed"}
ActsAlone == Rules.pp_decision = "consensus_or_local_failed"
FollowsBatch == Rules.pp_decision = "rank0_by_request_id"
WatchedStates == IF FollowsBatch THEN {"Waiting", "Inflight"} ELSE {"Inflight"}

\* ---- stage 0 hears

\* Take a turn even if there is nothing to decide, where that can make a difference on later stages.
Woken(r, failedLater) ==
  IF UsesRing /\ (Ready(r) # <<>> \/ (failedLater /\ ActsAlone)) THEN [r EXCEPT !.awake = TRUE] ELSE r

Reported(r, k, q, poll) ==
  LET others == {report \in r.reports : report[1] # k \/ report[2] # q}
  IN IF Has(r, q) THEN [r EXCEPT !.reports = others \union {<<k, q, poll>>}] ELSE r

HearNews(r, message) ==
  LET inQueue == Range(InState(r, {"Bootstrap"})) \ Range(r.agreed)
      fresh == Those(message[3], inQueue)
  IN IF r.stopped THEN r
     ELSE IF message[1] = "Status"
     THEN Woken(Reported(r, message[2], message[3], message[4]), message[4] = 0)
     ELSE [r EXCEPT !.agreed = @ \o fresh, !.awake = @ \/ fresh # <<>>]

RECURSIVE HearAllNews(_, _)
HearAllNews(r, news) == IF news = <<>> THEN r ELSE HearAllNews(HearNews(r, Head(news)), Tail(news))

\* ---- decode hears

HearStatus(leg, k, outcome) ==
  IF leg.state # "open" \/ leg.told THEN leg
  ELSE IF outcome = "Success" THEN [leg EXCEPT !.arrived = @ \union {k}]
  ELSE [leg EXCEPT !.told = TRUE, !.arrived = {}]

RECURSIVE HearAllStatus(_, _, _)
HearAllStatus(all, k, told) ==
  IF told = <<>> THEN all
  ELSE HearAllStatus([all EXCEPT ![Head(told)[1]] = HearStatus(@, k, Head(told)[2])], k, Tail(told))

\* ---- the move is over

\* A room without what tells equal futures apart: which failure it was, and all but the end of a tombstone.
Remembered(room) ==
  LET ended == IF room.local.cause = "None" THEN "None" ELSE CAUSE
  IN IF room.local.poll = "Retired"
     THEN [room EXCEPT !.local = [AbsentLocal EXCEPT !.poll = "Retired", !.lease = "Released", !.cause = ended]]
     ELSE [room EXCEPT !.local.cause = ended]

Write(p) ==
  LET kept == [p.r EXCEPT !.rooms = [q \in Requests |-> Remembered(@[q])]]
      k == p.index
      isHung == p.r.stopped /\ ~stage[k].stopped
  IN /\ stage' = IF k = 0 THEN [stage EXCEPT ![0] = kept]
                 ELSE [stage EXCEPT ![k] = kept, ![0] = HearAllNews(@, p.news)]
     /\ legs' = HearAllStatus(legs, k, p.told)
     \* O2 health-truth: an engine one of whose loops has ended must not say that it is healthy.
     /\ history' = IF isHung /\ Rules.health = "process_alive"
                   THEN [p.history EXCEPT !.broken = @ \union {"O2"}] ELSE p.history

\* ---- orders and facts

CarryOutOrder(p, q, name, argument) ==
  CASE name = "ArmDeadline" /\ argument # <<"tombstone">> -> [p EXCEPT !.r.timers = @ \union {<<q, argument[1]>>}]
    [] name = "CancelDeadline" -> [p EXCEPT !.r.timers = @ \ {<<q, argument[1]>>}]
    \* Decode hears of an outcome if it has told this stage its pages, or if it has just asked.
    [] name = "NotifyDecode" ->
         IF p.r.rooms[q].local.arrived # {} THEN [p EXCEPT !.told = Append(@, <<q, argument[1]>>)] ELSE p
    [] name = "AnswerDecode" -> [p EXCEPT !.told = Append(@, <<q, argument[1]>>)]
    [] name = "RejectRequest" ->
         IF Has(p.r, q) THEN [p EXCEPT !.r.entries[Position(p.r, q)] = <<@[1], @[2], TRUE>>] ELSE p
    [] OTHER -> p  \* tombstones outlive every message; pages never run out; decode's drain is no part of this

RECURSIVE CarryOutOrders(_, _, _)
CarryOutOrders(p, q, actions) ==
  IF actions = <<>> THEN p
  ELSE CarryOutOrders(CarryOutOrder(p, q, Head(actions)[1], Head(actions)[3]), q, Tail(actions))

Replicate(p, q) == [p EXCEPT !.news = Append(@, <<"Status", p.index, q, OwnReport(p.r, q)>>)]

\* Whom a change of poll concerns.
Tell(p, q) ==
  IF PollOf(p.r, q) \in NothingToDo THEN p
  ELSE IF p.index = 0 THEN [p EXCEPT !.r = Woken(@, FALSE)]
  ELSE IF Has(p.r, q) THEN Replicate(p, q) ELSE p

\* What the invariants have to know of a change of poll.
GoesBack(before, after) ==
  /\ after \in DOMAIN PollNumber
  /\ before \in {"Success", "Failed"} \/ (after # "Failed" /\ NumberOf(after) < NumberOf(before))
Ends(before, after) ==
  after \in {"Success", "Failed", "Retired"} \/ (after = "Absent" /\ before \in DOMAIN PollNumber)

Remember(h, k, q, before, after) ==
  LET meets == CASE Ends(before, after) -> "ended" [] after \in Live /\ h.met[k][q] = "no" -> "opened"
                 [] OTHER -> h.met[k][q]
  IN IF before = after THEN h
     ELSE [h EXCEPT !.met[k][q] = meets,
             !.broken = IF GoesBack(before, after) THEN @ \union {"S3"} ELSE @,
             !.failed = IF after = "Failed" THEN @ \union {q} ELSE @]

\* A legal step of a room, with everything that it orders.
Receive(p, q, step) ==
  LET before == PollOf(p.r, q)
      after == step.room.local.poll
      moved == [p EXCEPT !.r.rooms[q] = step.room, !.history = Remember(@, p.index, q, before, after)]
  IN CarryOutOrders(IF before = after THEN moved ELSE Tell(moved, q), q, step.actions)

\* Offer a fact to the room of a request.
StepOf(p, fact, q, detail) == StepRoom("sender", p.r.rooms[q], fact, Own(q), detail)
Deliver(p, fact, q, detail) ==
  LET step == StepOf(p, fact, q, detail)
      told == [p EXCEPT !.history.broken = @ \union {"S10"}]
  IN IF ~step.illegal THEN Receive(p, q, step)
     ELSE IF Rules.illegal_fact = "stops_scheduler" THEN [told EXCEPT !.r.stopped = TRUE]
     ELSE Receive(told, q, StepOf(told, "AbortRequested", q, <<"illegal_fact">>))

\* ------------------------------------------------------------------------- the scheduler: entries and commands

Move(p, q, fact) ==
  LET from == IF Has(p.r, q) THEN Entry(p.r, q)[2] ELSE "Unqueued"
      to == Step("prefill_request", [state |-> from], fact, <<>>).state.state
      IsOther(entry) == entry[1] # q
      IsOfOther(report) == report[2] # q
  IN IF ~Has(p.r, q) THEN [p EXCEPT !.r.entries = Append(@, <<q, to, FALSE>>)]
     ELSE IF to = "Done"
     THEN [p EXCEPT !.r.entries = SelectSeq(@, IsOther), !.r.reports = {each \in @ : IsOfOther(each)}]
     ELSE [p EXCEPT !.r.entries[Position(p.r, q)] = <<@[1], to, @[3]>>]

\* A later stage on which the request was ready, or over, before it was opened says so.
Open(p, q) ==
  LET queued == Move(p, q, "RequestArrived")
      opened == Deliver(queued, "RequestOpened", q, <<1>>)
      isLegal == ~StepOf(queued, "RequestOpened", q, <<1>>).illegal
  IN IF isLegal /\ p.index > 0 /\ OwnReport(opened.r, q) # 1 THEN Replicate(opened, q) ELSE opened

Obey(p, command) ==
  IF command[1] = "open" THEN Open(p, command[2])
  ELSE IF Has(p.r, command[2]) THEN Deliver(p, "AbortRequested", command[2], <<command[3]>>) ELSE p

RECURSIVE ObeyAll(_, _)
ObeyAll(p, list) == IF list = <<>> THEN p ELSE ObeyAll(Obey(p, Head(list)), Tail(list))

\* The router cancels decode's leg when the first stage has dropped prefill's, if it does not wait for both.
Cancels == Rules.router_join = "first_failure_cancels"

Drop(p, q) ==
  LET gone == Move(p, q, "DropAgreed")
      failed == IF PollOf(p.r, q) \in {"Failed", "Retired"} THEN gone
                ELSE Deliver(gone, "AbortRequested", q, <<CAUSE>>)
      \* Without a room of its own there is nothing to clear.
      cleared == IF Entry(p.r, q)[3] \/ PollOf(p.r, q) = "Absent" THEN gone ELSE Deliver(failed, "Cleared", q, <<>>)
  IN IF p.index = 0 /\ Cancels THEN [cleared EXCEPT !.told = Append(@, <<q, "Cancelled">>)] ELSE cleared

\* A decision is <<q, outcome>>. A stage does it with whatever of it it still has.
Execute(p, decision) ==
  LET q == decision[1]
      told == [p EXCEPT !.history.decided[p.index] = Append(@, decision)]
  IN IF ~Has(p.r, q) THEN p
     ELSE CASE decision[2] = "admit" -> Move(told, q, "AdmissionAgreed")
            [] decision[2] = "drop" -> Drop(told, q)
            [] decision[2] = "conclude" -> Deliver(Move(told, q, "TransferAgreed"), "Cleared", q, <<>>)

RECURSIVE ApplyAll(_, _)
ApplyAll(p, decisions) == IF decisions = <<>> THEN p ELSE ApplyAll(Execute(p, Head(decisions)), Tail(decisions))

\* Run a request through the stage and post its write; what has failed is computed all the same.
CanSend(p, q) == PollOf(p.r, q) \in {"WaitingForInput", "Transferring"}
ComputeOne(p, q) ==
  LET reserved == IF CanSend(p, q) THEN Deliver(p, "PagesReserved", q, <<>>) ELSE p
      posted == IF CanSend(reserved, q) THEN Deliver(reserved, "WritePosted", q, <<TRUE>>) ELSE reserved
      isOver == CanSend(reserved, q) /\ ~WritesLater
  IN Move(IF isOver THEN Deliver(posted, "WriteCompleted", q, <<>>) ELSE posted, q, "ForwardFinished")

RECURSIVE Compute(_, _)
Compute(p, batch) == IF batch = <<>> THEN p ELSE Compute(ComputeOne(p, Head(batch)), Tail(batch))

EnterPipe(p, number, batch) == [p EXCEPT !.history.entered = @ \union {<<number, batch>>}]

\* -------------------------------------------------------------------------- how stages decide (agreement.py)

ReportOverStages(r, q) ==
  LET heard == [k \in Later |-> LET said == {report \in r.reports : report[1] = k /\ report[2] = q}
                                IN IF said = {} THEN 1 ELSE (CHOOSE report \in said : TRUE)[3]]
      all == {OwnReport(r, q)} \union {heard[k] : k \in Later}
  IN CHOOSE least \in all : \A other \in all : least <= other

RECURSIVE BootstrapDecisions(_, _)
BootstrapDecisions(r, queue) ==
  IF queue = <<>> THEN <<>>
  ELSE LET q == Head(queue)
           poll == ReportOverStages(r, q)
       IN (CASE poll = 0 -> <<<<q, "drop">>>> [] poll >= 2 -> <<<<q, "admit">>>> [] OTHER -> <<>>)
          \o BootstrapDecisions(r, Tail(queue))

RECURSIVE TransferDecisions(_, _)
TransferDecisions(r, watched) ==
  IF watched = <<>> THEN <<>>
  ELSE LET q == Head(watched)
           poll == ReportOverStages(r, q)
       IN (CASE poll = 0 -> <<<<q, "drop">>>> [] poll = 4 -> <<<<q, "conclude">>>> [] OTHER -> <<>>)
          \o TransferDecisions(r, Tail(watched))

Admissions(list) == [i \in DOMAIN list |-> <<list[i], "admit">>]
Drops(list) == [i \in DOMAIN list |-> <<list[i], "drop">>]

\* What stage 0 applies to its bootstrap queue: what it decides for all, or what the ring has agreed and its own drops.
Stage0Decisions(r, queue) ==
  LET decided == BootstrapDecisions(r, queue)
      IsOwnDrop(decision) == decision[2] = "drop" /\ decision[1] \notin Range(r.agreed)
  IN IF ~UsesRing THEN decided
     ELSE SelectSeq(decided, IsOwnDrop) \o Admissions(Those(r.agreed, Range(queue)))

\* C7: "third request: admit"; which request is third here, nobody checks.
RECURSIVE ZipPositions(_, _, _)
ZipPositions(decisions, theirs, ours) ==
  IF theirs = <<>> \/ ours = <<>> THEN <<>>
  ELSE LET IsAbout(decision) == decision[1] = Head(theirs)
           found == SelectSeq(decisions, IsAbout)
       IN (IF found = <<>> THEN <<>> ELSE <<<<Head(ours), found[1][2]>>>>)
          \o ZipPositions(decisions, Tail(theirs), Tail(ours))

\* What a later stage applies, given stage 0's step and its own queue.
StageDecisions(r, step, queue) ==
  LET HasFailed(q) == NumberOf(PollOf(r, q)) = 0
      failed == SelectSeq(queue, HasFailed)
      IsBeyond(decision) == decision[1] \notin Range(step.queue)
      IsPastQueue(decision) == decision[1] \notin Range(queue)
      dropped == IF ActsAlone THEN failed ELSE <<>>
      agreed == Those(step.agreed, Range(queue) \ Range(dropped))
  IN CASE Rules.pp_decision = "rank0_by_request_id" -> step.decisions
       [] Rules.pp_decision = "rank0_by_position" ->
            ZipPositions(step.decisions, step.queue, queue) \o SelectSeq(step.decisions, IsBeyond)
       [] OTHER -> Drops(dropped) \o Admissions(agreed) \o SelectSeq(step.decisions, IsPastQueue)

\* ---------------------------------------------------------------------------------------------- turns

\* What one stage hands to the next. number: that of its batch.
Step0(r, bootstrap, transfer, batch) ==
  LET sent == IF UsesRing THEN transfer ELSE bootstrap \o transfer
  IN [commands |-> commands, decisions |-> sent,
      queue |-> IF sent = <<>> THEN <<>> ELSE InState(r, {"Bootstrap"}),
      candidates |-> IF UsesRing THEN Ready(r) ELSE <<>>, agreed |-> r.agreed, batch |-> batch, number |-> r.batches]

IsEmpty(step) ==
  step.commands = <<>> /\ step.decisions = <<>> /\ step.candidates = <<>> /\ step.agreed = <<>> /\ step.batch = <<>>

Bootstrap0(r) == Stage0Decisions(r, InState(r, {"Bootstrap"}))
Transfer0(r) == TransferDecisions(r, InState(r, WatchedStates))

\* One turn of stage 0: decide, hand on, compute.
Turn(p) ==
  LET r == p.r
      bootstrap == Bootstrap0(r)
      transfer == Transfer0(r)
      obeyed == ObeyAll([p EXCEPT !.r.agreed = <<>>, !.r.awake = FALSE], commands)
      applied == ApplyAll(obeyed, bootstrap \o transfer)
      batch == InState(applied.r, {"Waiting"})
      step == Step0(r, bootstrap, transfer, batch)
      handed == IF ~IsEmpty(step) \/ ActsAlone THEN [applied EXCEPT !.handed = step] ELSE applied
  IN IF batch = <<>> THEN handed
     ELSE Compute([EnterPipe(handed, r.batches, batch) EXCEPT !.r.batches = @ + 1], batch)

\* One turn of a later stage: apply what stage 0 decided, compute the same batch. Stage-to-stage receives match by order
\* alone: a stage with another batch waits for ever.
FollowStep(p, step) ==
  LET queue == InState(p.r, {"Bootstrap"})
      candidates == Those(step.candidates, Range(Ready(p.r)))
      applied == ApplyAll(ObeyAll(p, step.commands), StageDecisions(p.r, step, queue))
      batch == IF FollowsBatch THEN step.batch ELSE InState(applied.r, {"Waiting"})
      handed == IF p.index < LastStage THEN [applied EXCEPT !.handed = [step EXCEPT !.candidates = candidates]]
                ELSE IF candidates = <<>> THEN applied
                ELSE [applied EXCEPT !.news = Append(@, <<"Agreed", p.index, candidates>>)]
      entered == IF batch = <<>> /\ step.batch = <<>> THEN handed ELSE EnterPipe(handed, step.number, batch)
  IN IF batch # step.batch \/ \E q \in Range(batch) : ~Has(applied.r, q)
     THEN [entered EXCEPT !.r.stopped = TRUE] ELSE Compute(entered, batch)

Handed(p, channels) ==
  IF p.handed = <<>> THEN channels ELSE [channels EXCEPT ![p.index + 1] = Send(@, p.handed)]

\* ---------------------------------------------------------------------------------------------- faults

CanSpend(kind) == kind \in DOMAIN faults /\ faults[kind] > 0 /\ faults.total > 0
Spend(kind) == faults' = [faults EXCEPT ![kind] = @ - 1, !.total = @ - 1]
Spare == UNCHANGED faults

\* ---------------------------------------------------------------------------------------------- the other side

CanDispatch(q) == legs[q].state = "new"
Dispatch(q) ==
  /\ CanDispatch(q)
  /\ legs' = [legs EXCEPT ![q].state = "open"]
  /\ commands' = Send(commands, <<"open", q>>)
  /\ inbox' = [k \in Stages |-> Send(inbox[k], <<"Metadata", q>>)]
  /\ UNCHANGED <<stage, pipe, history>> /\ Spare

\* Every part has arrived. The client is told success: S9 truthful-result, if a stage says that it failed.
CanDecode(q) == legs[q].arrived = Stages
Decode(q) ==
  /\ CanDecode(q)
  /\ legs' = [legs EXCEPT ![q] = [state |-> "done", arrived |-> {}, told |-> FALSE]]
  /\ history' = IF q \in history.failed THEN [history EXCEPT !.broken = @ \union {"S9"}] ELSE history
  /\ UNCHANGED <<stage, commands, pipe, inbox>> /\ Spare

\* Decode gives up and tells every stage.
Lose(q) ==
  /\ legs' = [legs EXCEPT ![q] = [state |-> "failed", arrived |-> {}, told |-> FALSE]]
  /\ inbox' = [k \in Stages |-> Send(inbox[k], <<"Abort", q>>)]
  /\ UNCHANGED <<stage, commands, pipe, history>>

CanHearFailure(q) == legs[q].told
HearFailure(q) == CanHearFailure(q) /\ Lose(q) /\ Spare

IsOpen(q) == legs[q].state = "open" /\ ~legs[q].told
DecodeGivesUp(q) == IsOpen(q) /\ CanSpend("decode_abort") /\ Spend("decode_abort") /\ Lose(q)

\* A command, which travels with the steps.
PrefillGivesUp(q) ==
  /\ legs[q].state = "open" /\ CanSpend("prefill_abort") /\ Spend("prefill_abort")
  /\ commands' = Send(commands, <<"abort", q, "aborted">>)
  /\ UNCHANGED <<legs, stage, pipe, inbox, history>>

\* ---------------------------------------------------------------------------------------------- the stages

CanTakeTurn ==
  LET r == stage[0]
  IN ~r.stopped /\ (r.awake \/ commands # <<>> \/ Bootstrap0(r) # <<>> \/ Transfer0(r) # <<>>)
TakeTurn ==
  /\ CanTakeTurn
  /\ LET p == Turn(Pen(0)) IN Write(p) /\ pipe' = Handed(p, pipe)
  /\ commands' = <<>>
  /\ UNCHANGED inbox /\ Spare

CanFollow(k) == ~stage[k].stopped /\ pipe[k] # <<>>
Follow(k) ==
  /\ CanFollow(k)
  /\ LET p == FollowStep(Pen(k), Head(pipe[k])) IN Write(p) /\ pipe' = Handed(p, [pipe EXCEPT ![k] = Tail(@)])
  /\ UNCHANGED <<commands, inbox>> /\ Spare

CanHear(k) == ~stage[k].stopped /\ inbox[k] # <<>>
Hear(k) ==
  /\ CanHear(k)
  /\ LET message == Head(inbox[k])
     IN Write(IF message[1] = "Metadata" THEN Deliver(Pen(k), "DestinationRegistered", message[2], <<0, 1>>)
              ELSE Deliver(Pen(k), "PeerAborted", message[2], <<0>>))
  /\ inbox' = [inbox EXCEPT ![k] = Tail(@)]
  /\ UNCHANGED <<commands, pipe>> /\ Spare

CanWrite(k, q) == ~stage[k].stopped /\ stage[k].rooms[q].local.outstanding > 0
WriteEnds(k, q) ==
  /\ CanWrite(k, q)
  /\ Write(Deliver(Pen(k), "WriteCompleted", q, <<>>))
  /\ UNCHANGED <<commands, pipe, inbox>> /\ Spare

\* The stage-local failure of sglang#26912: no other stage is told to.
StageGivesUp(k, q) ==
  /\ ~stage[k].stopped /\ Has(stage[k], q) /\ CanSpend("pp_abort") /\ Spend("pp_abort")
  /\ Write(Deliver(Pen(k), "AbortRequested", q, <<"aborted">>))
  /\ UNCHANGED <<commands, pipe, inbox>>

\* ---------------------------------------------------------------------------------------------- deadlines

Ring(k, name) ==
  /\ ~stage[k].stopped
  /\ \E timer \in stage[k].timers :
       /\ timer[2] = name
       /\ Write(Deliver([Pen(k) EXCEPT !.r.timers = @ \ {timer}], "DeadlineReached", timer[1], <<name>>))
  /\ UNCHANGED <<commands, pipe, inbox>>

StepEnabled ==
  \/ CanTakeTurn
  \/ \E q \in Requests : CanDispatch(q) \/ CanDecode(q) \/ CanHearFailure(q)
  \/ \E k \in Later : CanFollow(k)
  \/ \E k \in Stages : CanHear(k) \/ \E q \in Requests : CanWrite(k, q)

PassDeadline(k, name) == ~StepEnabled /\ Ring(k, name) /\ Spare
PassDeadlineEarly(k, name) == CanSpend("slowness") /\ Spend("slowness") /\ Ring(k, name)
PassWaiting(q) == ~StepEnabled /\ IsOpen(q) /\ Lose(q) /\ Spare

\* ---------------------------------------------------------------------------------------------- behaviours

\* What the protocol owes: every step and every deadline.
Owed ==
  \/ TakeTurn
  \/ \E q \in Requests : Dispatch(q) \/ Decode(q) \/ HearFailure(q) \/ PassWaiting(q)
  \/ \E k \in Later : Follow(k)
  \/ \E k \in Stages : Hear(k) \/ \E q \in Requests : WriteEnds(k, q)
  \/ \E k \in Stages, name \in DeadlineNames : PassDeadline(k, name)

\* Nobody is owed a fault.
Fault ==
  \/ \E q \in Requests : DecodeGivesUp(q) \/ PrefillGivesUp(q)
  \/ \E k \in Stages, q \in Requests : StageGivesUp(k, q)
  \/ \E k \in Stages, name \in DeadlineNames : PassDeadlineEarly(k, name)

Next == Owed \/ Fault

\* When nothing is owed any more.
IsQuiet ==
  /\ ~StepEnabled
  /\ \A k \in Stages : stage[k].stopped \/ stage[k].timers = {}
  /\ \A q \in Requests : ~IsOpen(q)

\* WF_vars(Owed), with the state in which Owed is not enabled called by its name, because TLC is very slow to find out
\* for itself. Every move uses something up (a message, a timer, a request that is not done, a fault), so no behaviour
\* goes round in circles, and fairness to all of Owed together comes to the same as fairness to each action of it.
Fairness == []<>IsQuiet \/ []<><<Owed>>_vars

Safety == Init /\ [][Next]_vars
Spec == Safety /\ Fairness

\* ---------------------------------------------------------------------------------------------- what must hold

\* S3 sticky-terminal: no room leaves Success or Failed for another poll, and none goes back.
S3 == "S3" \notin history.broken

\* S7 rank-agreement: all stages decide the same things in the same order, and compute the same batches.
S7 ==
  /\ \A one \in history.entered, other \in history.entered : one[1] = other[1] => one[2] = other[2]
  /\ \A i \in Stages, j \in Stages :
       \A n \in 1 .. Min(Len(history.decided[i]), Len(history.decided[j])) :
         history.decided[i][n] = history.decided[j][n]

\* S9 truthful-result: the client is told success only if no stage has failed.
S9 == "S9" \notin history.broken

\* S10 containment: no room is offered an illegal fact, and no scheduler stops because of one.
S10 == "S10" \notin history.broken

\* O2 health-truth: an engine that hangs does not say that it is healthy.
O2 == "O2" \notin history.broken

\* R1 quiesce-zero, O1 metric-truth: when nothing more can happen, nothing is left, and no queue counts anything.
O1 == IsQuiet => \A k \in Stages : stage[k].entries = <<>>
R1 ==
  IsQuiet => \A k \in Stages :
    /\ stage[k].entries = <<>> /\ stage[k].timers = {}
    /\ \A q \in Requests : PollOf(stage[k], q) \in {"Absent", "Retired"}

\* L1 bounded-end: every request that was dispatched comes to an end on every stage. One that a stage has never heard
\* of need not, once the client has its answer.
HasEnded(k, q) ==
  history.met[k][q] = "ended" \/ (history.met[k][q] = "no" /\ legs[q].state \in {"done", "failed"})
L1 == \A k \in Stages, q \in Requests : (legs[q].state # "new") ~> HasEnded(k, q)
================================================================================
