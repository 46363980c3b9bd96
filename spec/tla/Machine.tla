-------------------------------- MODULE Machine --------------------------------
(* How the protocol moves: one step of one machine, as a function of its state, a fact and the fact's detail.

   This is the twin of statemachine/machine.py, guards.py, updates.py and roles.py, written by hand from the same
   words. The rows come from Tables.tla, which is generated. A test steps both on thousands of samples and finds them
   equal; so what TLC says of a cluster built on this module is said of the code that runs.

   The operators to use
     StepRoom(role, room, fact, incarnation, detail)  ->  [room, actions, illegal]     role: "sender", "receiver"
     Step(role, state, fact, detail)                  ->  [state, orders, illegal]     every other role
     Absent(incarnation)                                  the room of which nothing is known
     Start(role)                                          the first state of every other role
   An illegal fact moves nothing: the room or state comes back as it was, with no action, and illegal = TRUE.

   How values are written
     incarnation  <<room, attempt, epoch>>
     room         [incarnation |-> <<...>>, local |-> Local]
     action       <<kind, incarnation, detail>>;  an order, for the small roles, is <<kind, detail>>
     a mask       (Python: bits) is the set of its indices: arrived, contacted, drained, asked, entered, and the
                  masks in the details of RoutesResolved and PeerDied
     a detail     is always a tuple: <<>> for none, <<x>> for one thing, <<x, y>> for two
     an optional  field that would be a number is such a tuple too: <<>> or <<x>> (rank, epoch, shape);
                  a missing cause is "None", because causes are texts
     ranks        of the registry: a set of <<name, epoch>>

   Why tuples: TLC refuses to compare a text with a number, even to find them different, but it compares tuples
   of different lengths. With tuples, a detail that may be missing can be compared with one that is there. Two whole
   messages <<kind, ...>> are always comparable, because facts and actions of one kind carry details of one form;
   two bare details of different kinds are not.

   Everything that does not depend on a state (which rows exist under Rules, cell by cell) stands in definitions
   without parameters, which TLC evaluates once. *)
EXTENDS Tables, FiniteSets

CONSTANT Rules  \* the rules of a profile, such as Profiles["reference"]

RoomRoles == {"sender", "receiver"}

AbsentLocal == [
  poll |-> "Absent", lease |-> "Unreserved", expected |-> 0, arrived |-> {}, contacted |-> {}, drained |-> {},
  outstanding |-> 0, last |-> FALSE, owned |-> FALSE, cleared |-> FALSE, asked |-> {}, cause |-> "None"]

Absent(incarnation) == [incarnation |-> incarnation, local |-> AbsentLocal]

Starts == [
  registration |-> [state |-> "Unregistered", attempt |-> 0, replaced |-> FALSE],
  registry |-> [state |-> "Empty", ranks |-> {}, puts |-> 0],
  dp_entry |-> [state |-> "Unknown", rank |-> <<>>],
  resolution |-> [state |-> "Unresolved", rank |-> <<>>],
  peer |-> [state |-> "Alive", epoch |-> <<>>, misses |-> 0],
  prefill_request |-> [state |-> "Unqueued"],
  decode_request |-> [state |-> "Unqueued"],
  collective |-> [state |-> "Open", entered |-> {}, shape |-> <<>>],
  router |-> [state |-> "Waiting", cause |-> "None"]]

Start(role) == Starts[role]

\* ---------------------------------------------------------------------------------------------- guards

Guard(name, s, detail) ==
  CASE name = "timer_is_bootstrap" -> detail[1] = "bootstrap"
    [] name = "timer_is_transfer" -> detail[1] = "transfer"
    [] name = "timer_is_announced" -> detail[1] = "announced"
    [] name = "timer_is_tombstone" -> detail[1] = "tombstone"
    [] name = "timer_is_waiting" -> detail[1] = "waiting"
    [] name = "timer_is_admission" -> detail[1] = "admission"
    [] name = "timer_is_drain" -> detail[1] = "drain"
    \* senders
    [] name = "no_write_outstanding" -> s.outstanding = 0
    [] name = "abort_is_owed" -> s.asked # {}
    [] name = "was_last_write" -> s.last /\ s.outstanding = 1
    [] name = "arrival_completes" -> Cardinality(s.arrived \union {detail[1]}) >= detail[2]
    [] name = "needs_no_destination" -> detail[1] = 0  \* a dummy CP rank moves no bytes
    [] name = "abort_was_early" -> s.asked # {}
    [] name = "destinations_were_complete" -> Cardinality(s.arrived) >= detail[1]
    [] name = "has_no_owner" -> ~s.owned
    \* receivers
    [] name = "has_routes" -> s.contacted # {}
    [] name = "has_no_routes" -> s.contacted = {}
    [] name = "outcome_is_failed" -> detail[2] = "Failed"
    [] name = "outcome_is_success" -> detail[2] = "Success"
    [] name = "response_completes" ->  \* duplicates do not count
         detail[2] = "Success" /\ s.expected > 0 /\ Cardinality(s.arrived \union {detail[1]}) >= s.expected
    [] name = "is_not_committed" -> s.poll = "Success" /\ ~s.cleared
    [] name = "memory_is_exposed" -> s.lease = "Exposed"
    [] name = "all_have_drained" -> s.contacted \subseteq s.drained
    [] name = "not_all_have_drained" -> ~(s.contacted \subseteq s.drained)
    [] name = "a_sibling_lives" -> ~(s.contacted \subseteq detail[1])
    \* both
    [] name = "memory_is_back" -> s.lease \in {"Unreserved", "Settled", "Released"}
    [] name = "was_cleared" -> s.cleared
    [] name = "remembers_success" -> s.cause = "None"
    [] name = "remembers_failure" -> s.cause # "None"
    \* rendezvous
    [] name = "server_was_replaced" -> s.replaced
    [] name = "attempts_left" -> s.attempt < Rules.register_attempts
    [] name = "registration_completes" ->
         IF Rules.ready_means = "count_of_puts" THEN s.puts + 1 >= detail[3]
         ELSE Cardinality({entry[1] : entry \in s.ranks} \union {detail[1]}) >= detail[3]
    [] name = "rank_is_known" -> detail = <<>> \/ \E entry \in s.ranks : entry[1] = detail[1]
    [] name = "rank_is_listed" -> \E entry \in s.ranks : entry[1] = detail[1]
    [] name = "a_later_life_is_listed" -> \E entry \in s.ranks : entry[1] = detail[1] /\ entry[2] > detail[2]
    [] name = "is_the_last_rank" -> Cardinality(s.ranks) = 1 /\ \E entry \in s.ranks : entry[1] = detail[1]
    [] name = "one_dp_rank" -> detail[1] = 1
    [] name = "follows_the_room" -> detail[2]
    [] name = "answer_is_known" -> detail # <<>>
    [] name = "epoch_is_new" -> s.epoch # <<>> /\ detail[1] > s.epoch[1]
    [] name = "miss_is_last" -> s.misses + 1 >= Rules.heartbeat_max_failure
    \* collectives
    [] name = "shape_differs" -> s.entered # {} /\ s.shape # <<detail[3]>>
    [] name = "everyone_entered" -> Cardinality(s.entered \union {detail[1]}) >= detail[2]

\* --------------------------------------------------------------------------------------------- updates

\* Are the prefill ranks of this room still looked for, to set it up or to tell them that it has failed? What the router
\* has seen for itself it tells both sides.
SeenByRouter == {"engine_crashed", "connection_refused", "client_left", "room_in_use"}
StillLooks(local) ==
  \/ local.poll = "Bootstrapping"
  \/ /\ local.poll = "Failed" \/ (local.poll = "Retired" /\ local.cause # "None")
     /\ local.contacted = {} /\ local.cause \notin SeenByRouter
     /\ Rules.decode_failure_notice = "looks_on"

\* The newest process of a rank retires the endpoint of its predecessor.
EnterRank(ranks, name, epoch) ==
  IF \E entry \in ranks : entry[1] = name /\ entry[2] > epoch THEN ranks
  ELSE {entry \in ranks : entry[1] # name} \union {<<name, epoch>>}

Newest(known, epoch) == IF known # <<>> /\ known[1] > epoch THEN known ELSE <<epoch>>

Update(name, s, detail) ==
  CASE name = "own" -> [s EXCEPT !.owned = TRUE]
    [] name = "expect" -> [s EXCEPT !.expected = detail[1]]
    [] name = "note_arrival" -> [s EXCEPT !.arrived = @ \union {detail[1]}]
    [] name = "count_write" -> [s EXCEPT !.outstanding = @ + 1, !.last = @ \/ detail = <<TRUE>>]
    [] name = "uncount_write" -> [s EXCEPT !.outstanding = IF @ > 0 THEN @ - 1 ELSE 0]
    [] name = "note_abort" -> [s EXCEPT !.asked = @ \union {detail[1]}]
    [] name = "note_routes" -> [s EXCEPT !.contacted = detail[1], !.expected = detail[2]]
    [] name = "note_response" -> [s EXCEPT !.arrived = @ \union {detail[1]}]
    [] name = "note_drain" -> [s EXCEPT !.drained = @ \union {detail[1]}]
    [] name = "note_death" -> [s EXCEPT !.drained = @ \union detail[1]]  \* a dead process writes nothing any more
    [] name = "note_refusal" -> [s EXCEPT !.drained = s.contacted]  \* refused by the owner itself
    [] name = "mark_cleared" -> [s EXCEPT !.cleared = TRUE]
    [] name = "forget" -> AbsentLocal
    [] name = "adopt" -> [s EXCEPT !.cleared = FALSE]  \* the newcomer uses the old entry; Foreign gives it the name
    \* rendezvous
    [] name = "count_attempt" -> [s EXCEPT !.attempt = @ + 1, !.replaced = FALSE]
    [] name = "first_attempt" -> [s EXCEPT !.attempt = 1, !.replaced = FALSE]
    [] name = "no_attempt" -> [s EXCEPT !.attempt = 0, !.replaced = FALSE]
    [] name = "meet_server" -> [s EXCEPT !.replaced = FALSE]
    [] name = "mark_replaced" -> [s EXCEPT !.replaced = TRUE]
    [] name = "enter_rank" -> [s EXCEPT !.ranks = EnterRank(@, detail[1], detail[2]), !.puts = @ + 1]
    [] name = "remove_rank" ->
         LET ranks == {entry \in s.ranks : entry[1] # detail[1]}
         IN [s EXCEPT !.ranks = ranks, !.puts = IF ranks = {} \/ @ = 0 THEN 0 ELSE @ - 1]
    [] name = "enter_dp_rank" -> [s EXCEPT !.rank = detail]
    [] name = "resolve_zero" -> [s EXCEPT !.rank = <<0>>]
    [] name = "resolve_by_room" -> [s EXCEPT !.rank = <<detail[3]>>]
    [] name = "resolve_by_answer" -> [s EXCEPT !.rank = detail]
    [] name = "believe_epoch" -> [s EXCEPT !.epoch = Newest(@, detail[1]), !.misses = 0]
    [] name = "count_miss" -> [s EXCEPT !.misses = @ + 1]
    \* collectives
    [] name = "enter_collective" -> [s EXCEPT !.entered = @ \union {detail[1]}, !.shape = <<detail[3]>>]

RECURSIVE UpdateAll(_, _, _)
UpdateAll(names, s, detail) ==
  IF names = <<>> THEN s ELSE UpdateAll(Tail(names), Update(Head(names), s, detail), detail)

\* ------------------------------------------------------------- the tables, as far as the rules choose them

\* Some element of a list of <<fact, values>> is about this fact (and this state).
IsSaid(list, fact, state) == \E i \in DOMAIN list : list[i][1] = fact /\ state \in list[i][2]

Exists(row) == \A i \in DOMAIN row.when : Rules[row.when[i][1]] \in row.when[i][2]

\* Most actions say the same whatever the fact; those that do not are argued anew in each step.
AskedActions == {"AnswerDecode", "AcknowledgeAbort", "CancelLeg"}
Given(argument) == IF argument = "None" THEN <<>> ELSE <<argument>>
Compiled(row) == [
  guards |-> row.guards, update |-> row.update, to |-> row.to, cause |-> row.cause, actions |-> row.actions,
  isAsked |-> \E i \in DOMAIN row.actions : row.actions[i][1] \in AskedActions,
  orders |-> [i \in DOMAIN row.actions |-> <<row.actions[i][1], Given(row.actions[i][2])>>]]
CompiledAll(rows) == [i \in DOMAIN rows |-> Compiled(rows[i])]

Cell(table, state, fact) ==
  LET IsHere(row) == row.fact = fact /\ state \in row.from /\ Exists(row)
  IN [rows |-> CompiledAll(SelectSeq(table.rows, IsHere)), illegal |-> IsSaid(table.illegal, fact, state)]

Cells(table) == [state \in table.states |-> [fact \in table.facts |-> Cell(table, state, fact)]]

MainCells == [role \in DOMAIN Roles |-> Cells(Roles[role])]
LeaseCells == [role \in DOMAIN Roles |-> Cells(Roles[role].lease)]

\* The joint rows of a pair of states. A row that would leave both as they are is not triggered.
JointCell(joint, poll, lease) ==
  LET IsHere(row) == /\ poll \in row.polls /\ lease \in row.leases /\ Exists(row)
                     /\ ~(row.to_poll \in {"=", poll} /\ row.to_lease \in {"=", lease})
      rows == SelectSeq(joint, IsHere)
  IN [rows |-> CompiledAll(rows), polls |-> [i \in DOMAIN rows |-> rows[i].to_poll]]

JointCells == [role \in RoomRoles |-> [poll \in Roles[role].states |->
  [lease \in Roles[role].lease.states |-> JointCell(Roles[role].joint, poll, lease)]]]

StaleAnswer(stale, fact) ==
  LET IsHere(entry) == entry[1] = fact
      entries == SelectSeq(stale, IsHere)
  IN IF entries = <<>> THEN <<>> ELSE entries[1][2]

StaleAnswers == [role \in RoomRoles |-> [fact \in Roles[role].facts |-> StaleAnswer(Roles[role].stale, fact)]]

\* -------------------------------------------------------------------------------------------- one step

\* What an action is about: its argument in the table, and whom to answer when the fact named a peer.
Argue(name, argument, fact, detail) ==
  CASE name = "AnswerDecode" -> <<argument, detail[1]>>
    [] name = "AcknowledgeAbort" -> IF fact = "PeerAborted" THEN detail ELSE <<>>
    [] name = "CancelLeg" /\ Len(detail) = 2 -> IF detail[1] = "prefill" THEN <<"decode">> ELSE <<"prefill">>
    [] OTHER -> Given(argument)

Orders(row, fact, detail) ==
  IF row.isAsked
  THEN [i \in DOMAIN row.actions |-> <<row.actions[i][1], Argue(row.actions[i][1], row.actions[i][2], fact, detail)>>]
  ELSE row.orders

Cause(written, fact, detail) ==
  IF written # "detail" THEN written ELSE IF detail = <<>> THEN fact ELSE detail[Len(detail)]

\* Bookkeeping, first cause, next state. `place` is the field that holds the state's name.
Apply(row, s, fact, detail, place) ==
  LET updated == UpdateAll(row.update, s, detail)
      caused == IF row.cause = "None" \/ updated.cause # "None" THEN updated
                ELSE [updated EXCEPT !.cause = Cause(row.cause, fact, detail)]
  IN IF row.to = "=" THEN caused ELSE [caused EXCEPT ![place] = row.to]

Holds(guards, s, detail) == \A i \in DOMAIN guards : Guard(guards[i], s, detail)

\* Place of the first row whose guards hold, from i on; 0 if there is none.
RECURSIVE First(_, _, _, _)
First(rows, i, s, detail) ==
  IF i > Len(rows) THEN 0 ELSE IF Holds(rows[i].guards, s, detail) THEN i ELSE First(rows, i + 1, s, detail)

Take(cell, s, fact, detail, place) ==
  LET i == First(cell.rows, 1, s, detail)
  IN IF i = 0 THEN [state |-> s, orders |-> <<>>, illegal |-> cell.illegal]
     ELSE [state |-> Apply(cell.rows[i], s, fact, detail, place),
           orders |-> Orders(cell.rows[i], fact, detail), illegal |-> FALSE]

Step(role, state, fact, detail) == Take(MainCells[role][state.state][fact], state, fact, detail, "state")

\* -------------------------------------------------------------------------------------- one step of a room

\* Joint rows, which the pair of states alone triggers, until none applies.
RECURSIVE Settle(_, _, _, _, _)
Settle(role, local, orders, fact, detail) ==
  LET joint == JointCells[role][local.poll][local.lease]
      i == First(joint.rows, 1, local, detail)
      after == Apply(joint.rows[i], local, fact, detail, "lease")
      moved == IF joint.polls[i] = "=" THEN after ELSE [after EXCEPT !.poll = joint.polls[i]]
  IN IF i = 0 THEN [state |-> local, orders |-> orders, illegal |-> FALSE]
     ELSE Settle(role, moved, orders \o Orders(joint.rows[i], fact, detail), fact, detail)

\* The poll row, the lease row if the lease hears the fact, then joint rows.
StepLocal(role, local, fact, detail) ==
  LET refused == [state |-> local, orders |-> <<>>, illegal |-> TRUE]
      first == Take(MainCells[role][local.poll][fact], local, fact, detail, "poll")
      second == Take(LeaseCells[role][first.state.lease][fact], first.state, fact, detail, "lease")
  IN IF first.illegal THEN refused
     ELSE IF fact \notin Roles[role].lease.facts THEN Settle(role, first.state, first.orders, fact, detail)
     ELSE IF second.illegal THEN refused
     ELSE Settle(role, second.state, first.orders \o second.orders, fact, detail)

Addressed(orders, incarnation) == [i \in DOMAIN orders |-> <<orders[i][1], incarnation, orders[i][2]>>]

\* The fact is this room's own, or the room is absent and takes the fact's identity if anything comes of it.
StepOwn(role, room, fact, incarnation, detail) ==
  LET step == StepLocal(role, room.local, fact, detail)
  IN [room |-> IF step.state = room.local THEN room ELSE [incarnation |-> incarnation, local |-> step.state],
      actions |-> Addressed(step.orders, incarnation), illegal |-> step.illegal]

IsStrict == Rules.identity = "incarnation"

Rejects(actions) == \E i \in DOMAIN actions : actions[i][1] = "RejectRequest"

MeantFor(actions, incarnation) == [i \in DOMAIN actions |-> <<actions[i][1], incarnation, actions[i][3]>>]

\* Without identity, the fact acts on whatever holds the room number; a second opening may take the entry over.
StepShared(role, room, fact, incarnation, detail) ==
  LET rival == StepOwn(role, room, "RivalOpened", room.incarnation, detail)
  IN IF ~(fact = "RequestOpened" /\ room.local.owned) THEN StepOwn(role, room, fact, room.incarnation, detail)
     ELSE IF rival.illegal THEN rival
     ELSE IF Rejects(rival.actions) THEN [rival EXCEPT !.room = room, !.actions = MeantFor(@, incarnation)]
     ELSE [rival EXCEPT !.room = [incarnation |-> incarnation, local |-> rival.room.local]]

\* A later attempt at the same room number: it replaces what is over or has no owner yet, else it is a rival.
StepNewcomer(role, room, fact, incarnation, detail) ==
  LET fresh == StepOwn(role, Absent(incarnation), fact, incarnation, detail)
      rival == StepOwn(role, room, "RivalOpened", room.incarnation, detail)
  IN IF room.local.poll \in {"Retired", "Announced"}
     THEN IF fresh.illegal \/ fresh.room.local.poll = "Absent" THEN [fresh EXCEPT !.room = room] ELSE fresh
     ELSE IF fact = "RequestOpened" THEN [rival EXCEPT !.room = room, !.actions = MeantFor(@, incarnation)]
     ELSE [room |-> room, actions |-> <<>>, illegal |-> FALSE]

\* Meant for an incarnation that is over: nothing moves, and some facts are answered.
AnswerStale(role, room, fact, incarnation, detail) ==
  LET answers == StaleAnswers[role][fact]
  IN [room |-> room, illegal |-> FALSE, actions |-> [i \in DOMAIN answers |->
       <<answers[i][1], incarnation, Argue(answers[i][1], answers[i][2], fact, detail)>>]]

StepForeign(role, room, fact, incarnation, detail) ==
  IF ~IsStrict THEN StepShared(role, room, fact, incarnation, detail)
  ELSE IF incarnation[3] = room.incarnation[3] /\ incarnation[2] > room.incarnation[2]
  THEN StepNewcomer(role, room, fact, incarnation, detail)
  ELSE AnswerStale(role, room, fact, incarnation, detail)

\* Identity comes first: whose fact is it?
StepRoom(role, room, fact, incarnation, detail) ==
  IF /\ incarnation # room.incarnation
     /\ room.local.poll # "Absent" \/ (IsStrict /\ incarnation[3] # room.incarnation[3])
  THEN StepForeign(role, room, fact, incarnation, detail)
  ELSE StepOwn(role, room, fact, incarnation, detail)
================================================================================
