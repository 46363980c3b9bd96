---------------------------------- MODULE Pen ----------------------------------
(* A process of an engine, and what it does while one thing happens to it. Transfer.tla says what may happen, and what
   the words of the constants are; here are no variables.

   `Deliver` is the heart: a fact reaches a room, the machine answers with orders, each is carried out. A *pen* is a
   process at work: the process, what it has sent and what it has told so far. The twin of sim/explorer/process.py. *)
EXTENDS Machine

CONSTANTS Requests, Prefill, Decode, Pages

Nodes == Prefill \union Decode
Links == Prefill \X Decode
Rids == {request.rid : request \in Requests}
Asked == [rid \in Rids |-> CHOOSE request \in Requests : request.rid = rid]
Pair(rid) == <<Asked[rid].room, Asked[rid].attempt>>
Served == [node \in Nodes |-> {rid \in Rids : node \in {Asked[rid].prefill, Asked[rid].decode}}]
Side == [node \in Nodes |-> IF node \in Prefill THEN "prefill" ELSE "decode"]
RoleOf == [node \in Nodes |-> IF node \in Prefill THEN "sender" ELSE "receiver"]
QueueOf == [node \in Nodes |-> IF node \in Prefill THEN "prefill_request" ELSE "decode_request"]
Others == [node \in Nodes |-> IF node \in Prefill THEN Decode ELSE Prefill]
WireOf(node, other) == IF node \in Prefill THEN <<node, other>> ELSE <<other, node>>
DeadlineNames == [prefill |-> {"bootstrap", "transfer", "announced"},
                  decode |-> {"bootstrap", "admission", "waiting", "drain"}]

\* Partial functions are how a process keeps its tables.
Put(table, key, value) == IF key \in DOMAIN table THEN [table EXCEPT ![key] = value] ELSE table @@ (key :> value)
Drop(table, key) == IF key \in DOMAIN table THEN [each \in DOMAIN table \ {key} |-> table[each]] ELSE table
None == <<>>
Empty == <<>>  \* the function of nothing

\* ------------------------------------------------------------------------------------------ processes

(* rooms: number -> room, of those that are not Absent. timers: {<<incarnation, name>>}. entries: rid -> where it stands
   in the scheduler, why it was given up ("" if it was not), whether its room was refused. held: pair -> page.
   peers: node -> what the failure detector believes. known: what is kept for a room besides, by `Key`: on prefill
   [destination: None or <<node, incarnation, page>>, asker: None or <<node, incarnation>>], on decode <<node, epoch>>.
   contents: page -> pair for which it was last written. routes: node -> epoch of the cached endpoint. *)
Blank(epoch, up) == [
  epoch |-> epoch, up |-> up, stopped |-> FALSE, rooms |-> Empty, timers |-> {}, entries |-> Empty, held |-> Empty,
  free |-> {}, peers |-> Empty, known |-> Empty, contents |-> Empty, routes |-> Empty]

Watches(node) == node \in Decode \/ Rules.liveness_probe = "rank_epoch"

Fresh(node, epoch) == [Blank(epoch, TRUE) EXCEPT
  !.free = 0..(Pages - 1),
  !.peers = IF Watches(node) THEN [other \in Others[node] |-> [state |-> "Alive", epoch |-> <<0>>, misses |-> 0]]
            ELSE Empty]

Own(rid, process) == <<Asked[rid].room, Asked[rid].attempt, process.epoch>>
PairOf(incarnation) == <<incarnation[1], incarnation[2]>>

\* What a driver's own tables of a room are keyed by: the identity that the profile believes in.
Key(incarnation) == IF IsStrict THEN PairOf(incarnation) ELSE <<incarnation[1]>>

RoomAt(process, number) ==
  IF number \in DOMAIN process.rooms THEN process.rooms[number] ELSE Absent(<<number, 0, process.epoch>>)

\* ------------------------------------------------------------------------------------------ a process at work

(* p: the process. opening: the request whose room is being opened. legal: was the last fact legal? sent: messages as
   <<to, message>>, told: events (Witness.tla), in order. *)
PenOf(node, process) == [node |-> node, p |-> process, opening |-> "", legal |-> TRUE, sent |-> <<>>, told |-> <<>>]

Send(pen, to, message) == [pen EXCEPT !.sent = Append(@, <<to, message>>)]
Tell(pen, event) == [pen EXCEPT !.told = Append(@, event)]

Forget(pen, incarnation) == [pen EXCEPT !.p.known = Drop(@, Key(incarnation))]

\* The lowest free page, for an incarnation.
Reserve(pen, own) ==
  LET page == CHOOSE page \in pen.p.free : \A other \in pen.p.free : page <= other
  IN Tell([pen EXCEPT !.p.free = @ \ {page}, !.p.held = Put(@, PairOf(own), page)],
          [event |-> "Reserved", node |-> pen.node, pair |-> PairOf(own), page |-> page])

\* Give back what an incarnation holds; nothing if it holds nothing.
Release(pen, own) ==
  LET pair == PairOf(own)
      page == pen.p.held[pair]
  IN IF pair \notin DOMAIN pen.p.held THEN pen
     ELSE Tell([pen EXCEPT !.p.free = @ \union {page}, !.p.held = Drop(@, pair)],
               [event |-> "Released", node |-> pen.node, pair |-> pair, page |-> page,
                free |-> Cardinality(pen.p.free \union {page})])

\* Tell prefill where to write.
Publish(pen, own) ==
  LET peer == pen.p.known[Key(own)]
  IN IF Key(own) \notin DOMAIN pen.p.known \/ PairOf(own) \notin DOMAIN pen.p.held THEN pen
     ELSE Send(pen, peer[1], <<"Metadata", <<own[1], own[2], peer[2]>>, own, pen.p.held[PairOf(own)]>>)

NothingKnown == [destination |-> None, asker |-> None]
KnownOf(process, key) == IF key \in DOMAIN process.known THEN process.known[key] ELSE NothingKnown

\* What a sender's orders to the outside mean. origin: who sent the message that is being acted on.
CarryOutPrefill(pen, kind, own, argument, origin) ==
  LET known == KnownOf(pen.p, Key(own))
      chosen == IF argument = None THEN known.asker ELSE origin
  IN CASE kind = "NotifyDecode" /\ known.destination # None ->
            Send(pen, known.destination[1], <<"Status", known.destination[2], 0, argument[1]>>)
       [] kind = "AnswerDecode" /\ origin # None -> Send(pen, origin[1], <<"Status", origin[2], 0, argument[1]>>)
       [] kind = "AcknowledgeAbort" /\ chosen # None -> Send(pen, chosen[1], <<"Acknowledged", chosen[2], 0>>)
       [] OTHER -> pen

\* What a receiver's orders to the outside mean.
CarryOutDecode(pen, kind, own) ==
  LET peer == pen.p.known[Key(own)]
  IN CASE kind = "NotifyPrefill" /\ Key(own) \in DOMAIN pen.p.known ->
            Send(pen, peer[1], <<"Abort", <<own[1], own[2], peer[2]>>, own>>)
       [] kind = "SendMetadata" -> Publish(pen, own)
       [] OTHER -> pen

CarryOut(pen, action, origin) ==
  LET kind == action[1]
      own == action[2]
      argument == action[3]
  IN CASE kind = "ArmDeadline" ->
            IF argument = <<"tombstone">> THEN pen  \* A3
            ELSE [pen EXCEPT !.p.timers = @ \union {<<own, argument[1]>>}]
       [] kind = "CancelDeadline" -> [pen EXCEPT !.p.timers = @ \ {<<own, argument[1]>>}]
       [] kind = "ReleasePages" -> Release(pen, own)
       [] kind = "RejectRequest" ->
            IF pen.opening = "" THEN pen ELSE [pen EXCEPT !.p.entries[pen.opening].rejected = TRUE]
       [] OTHER -> IF pen.node \in Prefill THEN CarryOutPrefill(pen, kind, own, argument, origin)
                   ELSE CarryOutDecode(pen, kind, own)

RECURSIVE CarryOutAll(_, _, _)
CarryOutAll(pen, actions, origin) ==
  IF actions = <<>> THEN pen ELSE CarryOutAll(CarryOut(pen, Head(actions), origin), Tail(actions), origin)

\* A room has become another: what was kept for one that is gone is dropped.
Store(pen, before, after) ==
  LET number == after.incarnation[1]
      replaced == after.incarnation[2] # before.incarnation[2] /\ before.local.poll # "Absent"
      cleaned == IF replaced THEN Forget(pen, before.incarnation) ELSE pen
  IN IF after.local.poll = "Absent"
     THEN Forget([cleaned EXCEPT !.p.rooms = Drop(@, number)], after.incarnation)
     ELSE [cleaned EXCEPT !.p.rooms = Put(@, number, after)]

Stepped(pen, before, after, fact, meant, actions) == [
  event |-> "Stepped", node |-> pen.node, role |-> RoleOf[pen.node], fact |-> fact, meant |-> meant,
  own |-> IF after.incarnation = meant THEN meant ELSE before.incarnation,
  before |-> before.local.poll, after |-> after.local.poll,
  isLeaseMoved |-> before.local.lease # after.local.lease, cause |-> after.local.cause, isRejected |-> Rejects(actions)]

(* A fact reaches its room. An illegal one moves nothing; then the whole scheduler stops, or the request fails, as the
   profile has it. origin: <<node, incarnation, ...>> of the peer that sent it, or None. *)
RECURSIVE Deliver(_, _, _, _, _)
Deliver(pen, fact, incarnation, detail, origin) ==
  LET before == RoomAt(pen.p, incarnation[1])
      made == StepRoom(RoleOf[pen.node], before, fact, incarnation, detail)
      told == Stepped(pen, before, made.room, fact, incarnation, made.actions)
      stored == IF made.room = before THEN pen ELSE Store(pen, before, made.room)
      warned == Tell([pen EXCEPT !.legal = FALSE], [event |-> "IllegalFact", node |-> pen.node])
  IN IF ~made.illegal
     THEN IF made.room = before /\ made.actions = <<>> THEN [pen EXCEPT !.legal = TRUE]
          ELSE CarryOutAll(Tell([stored EXCEPT !.legal = TRUE], told), made.actions, origin)
     ELSE IF Rules.illegal_fact = "stops_scheduler" THEN [warned EXCEPT !.p.stopped = TRUE]
     ELSE [Deliver(warned, "AbortRequested", incarnation, <<"illegal_fact">>, None) EXCEPT !.legal = FALSE]

\* Facts about every room that has to do with another engine, in the order of their numbers; with an epoch, about
\* those of another life of it.
Concerned(pen, incarnation, other, epoch) ==
  LET known == pen.p.known[Key(incarnation)]
  IN /\ Key(incarnation) \in DOMAIN pen.p.known
     /\ IF pen.node \in Decode THEN known[1] = other /\ <<known[2]>> # epoch
        ELSE known.destination # None /\ known.destination[1] = other /\ <<known.destination[2][3]>> # epoch

RECURSIVE TellRooms(_, _, _, _, _, _)
TellRooms(pen, rooms, numbers, other, fact, epoch) ==
  LET number == CHOOSE number \in numbers : \A each \in numbers : number <= each
      own == rooms[number].incarnation
      detail == IF fact = "PeerDied" /\ pen.node \in Decode THEN <<{0}>> ELSE None
      told == IF Concerned(pen, own, other, epoch) THEN Deliver(pen, fact, own, detail, None) ELSE pen
  IN IF numbers = {} THEN pen ELSE TellRooms(told, rooms, numbers \ {number}, other, fact, epoch)

TellAll(pen, other, fact, epoch) == TellRooms(pen, pen.p.rooms, DOMAIN pen.p.rooms, other, fact, epoch)

\* A request moves on in the scheduler; one that is Done is forgotten.
Advance(pen, rid, fact) ==
  LET next == Step(QueueOf[pen.node], [state |-> pen.p.entries[rid].state], fact, <<>>).state.state
  IN IF next = "Done" THEN [pen EXCEPT !.p.entries = Drop(@, rid)] ELSE [pen EXCEPT !.p.entries[rid].state = next]
================================================================================
