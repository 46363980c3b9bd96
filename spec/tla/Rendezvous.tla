------------------------------ MODULE Rendezvous ------------------------------
(* Prefill ranks register with a bootstrap server that may fail; a decode rank finds its way to them.

   The twin of sim/explorer/rendezvous.py: one action for each move there, under the same conditions, on the same state.
   Start with Next at the end: what the protocol does (Steps), what passes when nothing else is left to happen
   (Deadlines), and what the environment does (Faults, each paid from the budget). Every action but Heal leaves
   `faults` to them.

   One prefill engine, P0, whose DP ranks P0/dp0, P0/dp1, ... register one by one; one decode rank, D0; a bootstrap
   server, B0; a router, R, that follows the room. Nobody but B0 dies, so every incarnation is <<room, 0, 0>> and the
   same on both sides.

     router         [healed, requests: rid -> [node, state]]       requests: those it has dispatched
     server         [up, epoch, registry, rooms: room -> entry]    rooms: which DP rank runs them, where told
     registrations  node -> [registration, retry, server]          retry: the back-off runs; server: a Peer
     prefill        node -> Process
     decode         a Process, and more: [topology, endpoints, finds: rid -> [asks, resolution, node]]
     chan           <<from, to>> -> messages, oldest first         an equal message under way stands for both
     requests, answers   client -> set of HTTP messages            each on a connection of its own
     faults         kind -> how many may still come

   A Process is [stopped, rooms: room -> Room, timers: {<<incarnation, name>>}, entries: rid -> [state, aborted,
   rejected], known: room -> node]. Tombstones never expire here. *)
EXTENDS Machine

CONSTANTS
  Requests,     \* rid -> [room, healed]; healed: dispatched only after the last fault, and its timers never ring
  DpRanks,      \* DP ranks of the prefill engine
  DpAttention,  \* data-parallel attention, or plain replicas
  StartsLate,   \* does the server start late, or is every rank registered from the beginning?
  Budget        \* kind of fault -> how many at most; "total" bounds them all together

VARIABLES router, server, registrations, prefill, decode, chan, requests, answers, faults

vars == <<router, server, registrations, prefill, decode, chan, requests, answers, faults>>

Rids == DOMAIN Requests
DpNames == <<"P0/dp0", "P0/dp1", "P0/dp2", "P0/dp3">>
DpNode(dp) == DpNames[dp + 1]
Dps == 0 .. DpRanks - 1
Nodes == {DpNode(dp) : dp \in Dps}
DpOf(node) == CHOOSE dp \in Dps : DpNode(dp) = node
Clients == Nodes \union {"D0"}
Own(rid) == <<Requests[rid].room, 0, 0>>
Home(room) == room % DpRanks

\* ---------------------------------------------------------------------------------------------- small things

Without(f, key) == [x \in DOMAIN f \ {key} |-> f[x]]
Set(f, key, value) == (key :> value) @@ f

Send(channels, link, message) ==
  IF \E i \in DOMAIN channels[link] : channels[link][i] = message THEN channels
  ELSE [channels EXCEPT ![link] = Append(@, message)]

RECURSIVE SendAll(_, _)  \* sent: a sequence of <<from, to, message>>
SendAll(channels, sent) ==
  IF sent = <<>> THEN channels
  ELSE SendAll(Send(channels, <<sent[1][1], sent[1][2]>>, sent[1][3]), Tail(sent))

Taken(channels, link) == [channels EXCEPT ![link] = Tail(@)]

HasOrder(orders, name) == \E i \in DOMAIN orders : orders[i][1] = name

\* ------------------------------------------------------------------- which DP rank runs a room: dp_rank.py

KnownRank(dp) == IF Rules.dp_rank_notion = "attention" /\ ~DpAttention THEN 0 ELSE dp

InConflict(room, rank) ==
  /\ DpRanks > 1 /\ Rules.dp_lookup # "query" /\ Rules.dp_conflict # "unchecked"
  /\ Home(room) # rank

MustRegister == DpRanks > 1 /\ Rules.dp_lookup = "query"

\* ------------------------------------------------------------------------------------- pens: a process at work

(* A pen is a process while it takes a step: the same fields, its name and role, what it has sent and asked so far, and
   the request that it is opening. *)
Pen(node, role, process) ==
  [node |-> node, role |-> role, sent |-> <<>>, asked |-> {}, opening |-> ""] @@ process

Process(pen) == [
  stopped |-> pen.stopped, rooms |-> pen.rooms, timers |-> pen.timers, entries |-> pen.entries, known |-> pen.known]

Tell(pen, to, message) == [pen EXCEPT !.sent = Append(@, <<pen.node, to, message>>)]

RoomAt(pen, room) == IF room \in DOMAIN pen.rooms THEN pen.rooms[room] ELSE Absent(<<room, 0, 0>>)

CarryOut(pen, action) ==
  LET kind == action[1]
      own == action[2]
      detail == action[3]
  IN CASE kind = "ArmDeadline" ->
            IF detail = <<"tombstone">> THEN pen ELSE [pen EXCEPT !.timers = @ \union {<<own, detail[1]>>}]
       [] kind = "CancelDeadline" -> [pen EXCEPT !.timers = @ \ {<<own, detail[1]>>}]
       [] kind = "RejectRequest" ->
            IF pen.opening = "" THEN pen ELSE [pen EXCEPT !.entries[pen.opening].rejected = TRUE]
       [] kind = "NotifyDecode" ->
            IF RoomAt(pen, own[1]).local.arrived = {} THEN pen ELSE Tell(pen, "D0", <<"Status", own, detail[1]>>)
       [] kind = "AnswerDecode" -> Tell(pen, "D0", <<"Status", own, detail[1]>>)
       [] kind = "AcknowledgeAbort" -> Tell(pen, "D0", <<"Acknowledged", own>>)
       [] kind = "NotifyPrefill" ->
            IF own[1] \in DOMAIN pen.known THEN Tell(pen, pen.known[own[1]], <<"Abort", own>>) ELSE pen
       [] OTHER -> pen  \* pages: their life is explored in Transfer.tla

RECURSIVE CarryOutAll(_, _)
CarryOutAll(pen, actions) ==
  IF actions = <<>> THEN pen ELSE CarryOutAll(CarryOut(pen, Head(actions)), Tail(actions))

Store(pen, room) ==
  LET number == room.incarnation[1]
  IN IF room.local.poll = "Absent"
     THEN [pen EXCEPT !.rooms = Without(@, number), !.known = Without(@, number)]
     ELSE [pen EXCEPT !.rooms = Set(@, number, room)]

Stepped(pen, fact, own, detail) == StepRoom(pen.role, RoomAt(pen, own[1]), fact, own, detail)
IsLegal(pen, fact, own, detail) == ~Stepped(pen, fact, own, detail).illegal

RECURSIVE Deliver(_, _, _, _)
Deliver(pen, fact, own, detail) ==
  LET step == Stepped(pen, fact, own, detail)
  IN IF ~step.illegal THEN CarryOutAll(Store(pen, step.room), step.actions)
     ELSE IF Rules.illegal_fact = "stops_scheduler" THEN [pen EXCEPT !.stopped = TRUE]
     ELSE Deliver(pen, "AbortRequested", own, <<"illegal_fact">>)

\* -- the scheduler's queue

Queue(pen, rid, fact) ==
  LET role == IF pen.role = "sender" THEN "prefill_request" ELSE "decode_request"
      entry == IF rid \in DOMAIN pen.entries THEN pen.entries[rid]
               ELSE [state |-> "Unqueued", aborted |-> "", rejected |-> FALSE]
      after == Step(role, [state |-> entry.state], fact, <<>>).state.state
  IN [pen EXCEPT !.entries = IF after = "Done" THEN Without(@, rid)
                             ELSE Set(@, rid, [entry EXCEPT !.state = after])]

Numbered == [Failed |-> 0, Bootstrapping |-> 1, WaitingForInput |-> 2, Transferring |-> 3, Success |-> 4]
Poll(name) == IF name \in DOMAIN Numbered THEN Numbered[name] ELSE 0

\* What a rank says of a request: its poll, and why it failed if it did.
Report(pen, rid) ==
  LET entry == pen.entries[rid]
      room == Own(rid)[1]
      said == IF room \notin DOMAIN pen.rooms THEN [poll |-> 0, cause |-> "room_lost"]
              ELSE [poll |-> Poll(pen.rooms[room].local.poll), cause |-> pen.rooms[room].local.cause]
  IN IF entry.rejected THEN [poll |-> 0, cause |-> "room_in_use"]
     ELSE IF entry.aborted # "" /\ said.poll # 0 THEN [poll |-> 0, cause |-> entry.aborted]
     ELSE said

Drop(pen, rid, side) ==
  LET own == Own(rid)
      cause == Report(pen, rid).cause
      queued == Queue(pen, rid, "DropAgreed")
      aborted == IF RoomAt(pen, own[1]).local.poll \in {"Failed", "Retired"} THEN queued
                 ELSE Deliver(queued, "AbortRequested", own, <<cause>>)
      cleared == IF pen.entries[rid].rejected \/ own[1] \notin DOMAIN pen.rooms THEN queued
                 ELSE Deliver(aborted, "Cleared", own, <<>>)
  IN Tell(cleared, "R", <<"Failed", rid, side, IF cause = "None" THEN "failed" ELSE cause>>)

\* Whose timers of this name may ring: not those of requests that came after the last fault.
Rings(process, name) ==
  {timer[1] : timer \in {timer \in process.timers : /\ timer[2] = name /\ ~process.stopped
                                                    /\ \A rid \in Rids : Requests[rid].healed => timer[1] # Own(rid)}}

Ring(pen, own, name) ==
  Deliver([pen EXCEPT !.timers = @ \ {<<own, name>>}], "DeadlineReached", own, <<name>>)

\* ----------------------------------------------------------------------------------------------- the router

CanDispatch(rid) == rid \notin DOMAIN router.requests /\ (Requests[rid].healed => router.healed)
Dispatch(rid, dp) ==
  /\ CanDispatch(rid)
  /\ router' = [router EXCEPT !.requests = Set(@, rid, [node |-> DpNode(dp), state |-> Start("router")])]
  /\ chan' = SendAll(chan, <<<<"R", DpNode(dp), <<"Open", rid>>>>, <<"R", "D0", <<"Open", rid>>>>>>)
  /\ UNCHANGED <<server, registrations, prefill, decode, requests, answers>>

\* The messages by which the router carries out its orders.
Cancels(rid, orders, cause) ==
  LET message == <<"Cancel", rid, IF cause = "None" THEN "cancelled" ELSE cause>>
      node == router.requests[rid].node
      legs == [prefill |-> <<node>>, decode |-> <<"D0">>]
      order == SelectSeq(orders, LAMBDA each : each[1] = "CancelLeg")
      chosen == IF order = <<>> THEN <<>> ELSE IF order[1][2] = <<>> THEN <<node, "D0">> ELSE legs[order[1][2][1]]
  IN [i \in DOMAIN chosen |-> <<"R", chosen[i], message>>]

RouterHears(node) ==
  LET link == <<node, "R">>
      message == Head(chan[link])
      rid == message[2]
      step == IF message[1] = "FirstToken" THEN Step("router", router.requests[rid].state, "DecodeAnswered", <<>>)
              ELSE Step("router", router.requests[rid].state, "LegFailed", <<message[3], message[4]>>)
  IN /\ chan[link] # <<>>
     /\ router' = [router EXCEPT !.requests[rid].state = step.state]
     /\ chan' = SendAll(Taken(chan, link), Cancels(rid, step.orders, step.state.cause))
     /\ UNCHANGED <<server, registrations, prefill, decode, requests, answers>>

\* No fault comes any more, and restarts are done.
CanHeal ==
  LET settled == IF Rules.register_exhausted = "continue_unregistered" THEN {"Registered", "Exhausted"}
                 ELSE {"Registered"}
  IN /\ \E rid \in Rids : Requests[rid].healed
     /\ ~router.healed /\ server.up
     /\ \A node \in Nodes : registrations[node].registration.state \in settled
     /\ Rules.registration_watch = "epoch" => \A node \in Nodes : registrations[node].server.epoch = <<server.epoch>>
Heal ==
  /\ CanHeal
  /\ router' = [router EXCEPT !.healed = TRUE]
  /\ faults' = [kind \in DOMAIN faults |-> 0]
  /\ UNCHANGED <<server, registrations, prefill, decode, chan, requests, answers>>

\* ------------------------------------------------------------------------------------- the bootstrap server

Blank(epoch, up) == [up |-> up, epoch |-> epoch, registry |-> Start("registry"), rooms |-> <<>>]

Listen ==
  /\ ~server.up
  /\ server' = Blank(server.epoch + 1, TRUE)
  /\ UNCHANGED <<router, registrations, prefill, decode, chan, requests, answers>>

\* With the process goes its memory.
Die ==
  /\ server.up
  /\ server' = Blank(server.epoch, FALSE)
  /\ UNCHANGED <<router, registrations, prefill, decode, chan, requests, answers>>

Entry(room) == IF room \in DOMAIN server.rooms THEN server.rooms[room] ELSE Start("dp_entry")
DpRank(room) == IF Step("dp_entry", Entry(room), "DpRankQueried", <<>>).orders = <<>> THEN <<>> ELSE Entry(room).rank

Statuses == [AnswerRoute |-> "200", AnswerNotReady |-> "503", AnswerUnknownRank |-> "404"]

\* What a request does to the server, and what is answered; <<>> where the client does not care.
Serve(request) ==
  CASE request[1] = "PUT /route" ->
         LET step == Step("registry", server.registry, "RankRegistered", Tail(request))
         IN [server |-> [server EXCEPT !.registry = step.state], answer |-> <<"PUT /route", "200">>]
    [] request[1] = "GET /route" ->
         LET target == IF request[3] = "" THEN <<>> ELSE <<request[3]>>
             order == Step("registry", server.registry, "RouteRequested", target).orders[1]
         IN [server |-> server, answer |-> Append(request, Statuses[order[1]])]
    [] request[1] = "POST /register_dp_rank" ->
         LET step == Step("dp_entry", Entry(request[2]), "DpRankRegistered", <<request[3]>>)
         IN [server |-> [server EXCEPT !.rooms = Set(@, request[2], step.state)], answer |-> <<>>]
    [] request[1] = "POST /query_dp_ranks" ->
         [server |-> server, answer |-> <<request[1], request[2], "200", DpRank(request[3])>>]

\* What the client learns when the server does not answer, or answers with an error.
Unheard(request, status) ==
  CASE request[1] = "PUT /route" -> <<"PUT /route", status>>
    [] request[1] = "GET /route" -> Append(request, status)
    [] request[1] = "POST /register_dp_rank" -> <<>>
    [] request[1] = "POST /query_dp_ranks" -> <<request[1], request[2], status, <<>>>>

Conclude(client, request, after, answer) ==
  /\ server' = after
  /\ requests' = [requests EXCEPT ![client] = @ \ {request}]
  /\ answers' = IF answer = <<>> THEN answers ELSE [answers EXCEPT ![client] = @ \union {answer}]
  /\ UNCHANGED <<router, registrations, prefill, decode, chan>>

ServerAnswers(client) == \E request \in requests[client] :
  LET served == Serve(request)
  IN IF server.up THEN Conclude(client, request, served.server, served.answer)
     ELSE Conclude(client, request, server, Unheard(request, "refused"))

\* It does what it is asked, and the client hears nothing (C1).
AnswerIsLost(client) == \E request \in requests[client] :
  /\ server.up /\ Unheard(request, "timeout") # <<>>
  /\ Conclude(client, request, Serve(request).server, Unheard(request, "timeout"))

ServerHasError(client) == \E request \in requests[client] :
  server.up /\ Conclude(client, request, server, Unheard(request, "500"))

\* ----------------------------------------------------------------------------------------------- registration

\* Offer a fact to one rank's registration and carry out what is ordered; `answersAfter` is what is left of answers.
Enlist(node, enlisted, fact, answersAfter) ==
  LET step == Step("registration", enlisted.registration, fact, <<>>)
      retry == enlisted.retry \/ HasOrder(step.orders, "ArmRetry")
      put == IF HasOrder(step.orders, "SendRegistration") THEN {<<"PUT /route", node, 0, DpRanks>>} ELSE {}
  IN /\ registrations' = [registrations EXCEPT ![node] =
          [registration |-> step.state, retry |-> retry, server |-> enlisted.server]]
     /\ requests' = [requests EXCEPT ![node] = @ \union put]
     /\ answers' = answersAfter
     /\ UNCHANGED <<router, server, prefill, decode, chan>>

CanBegin(node) == registrations[node].registration.state = "Unregistered"
BeginToRegister(node) ==
  /\ CanBegin(node)
  /\ Enlist(node, registrations[node], "Started", answers)

RegistrationAnswered(node) == \E answer \in answers[node] :
  LET fact == IF answer[2] = "200" THEN "RegistrationAccepted" ELSE "RegistrationFailed"
  IN Enlist(node, registrations[node], fact, [answers EXCEPT ![node] = @ \ {answer}])

RegisterAgain(node) ==
  /\ registrations[node].retry
  /\ Enlist(node, [registrations[node] EXCEPT !.retry = FALSE], "RetryDue", answers)

\* The failure detector hears of another life of the server. Probes that bring no news are no steps.
CanProbe(node) ==
  Rules.registration_watch = "epoch" /\ server.up /\ registrations[node].server.epoch # <<server.epoch>>
Probe(node) ==
  LET enlisted == registrations[node]
      step == Step("peer", enlisted.server, "ProbeAnswered", <<server.epoch>>)
      seen == [enlisted EXCEPT !.server = step.state]
  IN /\ CanProbe(node)
     /\ IF HasOrder(step.orders, "DeclareDead") THEN Enlist(node, seen, "ServerRestarted", answers)
        ELSE /\ registrations' = [registrations EXCEPT ![node] = seen]
             /\ UNCHANGED <<router, server, prefill, decode, chan, requests, answers>>

\* ---------------------------------------------------------------------------------------------------- prefill

Sender(node) == Pen(node, "sender", prefill[node])

\* A pen is done: its process, its messages and its HTTP requests become the new state.
PrefillDone(pen, channels) ==
  /\ prefill' = [prefill EXCEPT ![pen.node] = Process(pen)]
  /\ chan' = SendAll(channels, pen.sent)
  /\ requests' = [requests EXCEPT ![pen.node] = @ \union pen.asked]
  /\ UNCHANGED <<router, server, registrations, decode, answers>>

\* The request is queued; will decode find it here, and must the server be told where it runs?
PrefillOpens(pen, rid) ==
  LET own == Own(rid)
      rank == KnownRank(DpOf(pen.node))
      queued == [Queue(pen, rid, "RequestArrived") EXCEPT !.opening = rid]
      opened == Deliver(queued, "RequestOpened", own, <<1>>)
  IN IF ~IsLegal(queued, "RequestOpened", own, <<1>>) THEN opened
     ELSE IF InConflict(own[1], rank) THEN Deliver(opened, "DpConflictFound", own, <<"dp_conflict">>)
     ELSE IF MustRegister THEN [opened EXCEPT !.asked = {<<"POST /register_dp_rank", own[1], rank>>}]
     ELSE opened

PrefillHearsRouter(node) ==
  LET link == <<"R", node>>
      message == Head(chan[link])
      rid == message[2]
      pen == Sender(node)
  IN /\ chan[link] # <<>>
     /\ PrefillDone(
          IF pen.stopped THEN pen
          ELSE IF message[1] = "Open" THEN PrefillOpens(pen, rid)
          ELSE IF rid \in DOMAIN pen.entries THEN Deliver(pen, "AbortRequested", Own(rid), <<message[3]>>)
          ELSE pen, Taken(chan, link))

PrefillHearsDecode(node) ==
  LET link == <<"D0", node>>
      message == Head(chan[link])
      pen == Sender(node)
  IN /\ chan[link] # <<>>
     /\ PrefillDone(
          IF pen.stopped THEN pen
          ELSE IF message[1] = "Metadata" THEN Deliver(pen, "DestinationRegistered", message[2], <<0, 1>>)
          ELSE Deliver(pen, "PeerAborted", message[2], <<0>>), Taken(chan, link))

PrefillDeadline(node, name) == \E own \in Rings(prefill[node], name) :
  PrefillDone(Ring(Sender(node), own, name), chan)

InQueue(process, rid, state) == ~process.stopped /\ rid \in DOMAIN process.entries /\ process.entries[rid].state = state

\* The bootstrap queue: drop, or admit, compute and write, all in one move.
CanRun(node, rid) == InQueue(prefill[node], rid, "Bootstrap") /\ Report(prefill[node], rid).poll # 1
Run(node, rid) ==
  LET pen == Sender(node)
      own == Own(rid)
      poll == Report(pen, rid).poll
      reserved == Deliver(Queue(pen, rid, "AdmissionAgreed"), "PagesReserved", own, <<>>)
      written == Deliver(Deliver(reserved, "WritePosted", own, <<TRUE>>), "WriteCompleted", own, <<>>)
  IN /\ CanRun(node, rid)
     /\ PrefillDone(IF poll = 0 THEN Drop(pen, rid, "prefill") ELSE Queue(written, rid, "ForwardFinished"), chan)

CanBeDoneWith(node, rid) == InQueue(prefill[node], rid, "Inflight") /\ Report(prefill[node], rid).poll \in {0, 4}
PrefillIsDoneWith(node, rid) ==
  LET pen == Sender(node)
      poll == Report(pen, rid).poll
  IN /\ CanBeDoneWith(node, rid)
     /\ PrefillDone(IF poll = 0 THEN Drop(pen, rid, "prefill")
                    ELSE Deliver(Queue(pen, rid, "TransferAgreed"), "Cleared", Own(rid), <<>>), chan)

\* ----------------------------------------------------------------------------------------------------- decode

Receiver == Pen("D0", "receiver", decode)

\* Under http_calls = "blocking" the scheduler waits for the answer to a GET and does nothing else.
IsBlocked == /\ Rules.http_calls = "blocking"
             /\ \E rid \in DOMAIN decode.finds : decode.finds[rid].asks \in {"topology", "endpoint"}

\* Nobody looks for the prefill rank of other rooms any more.
DecodeDone(pen, channels, answersAfter) ==
  LET seeking == {rid \in DOMAIN pen.finds : StillLooks(RoomAt(pen, Own(rid)[1]).local)}
  IN /\ decode' = [topology |-> pen.topology, endpoints |-> pen.endpoints,
                   finds |-> [rid \in seeking |-> pen.finds[rid]]] @@ Process(pen)
     /\ chan' = SendAll(channels, pen.sent)
     /\ requests' = [requests EXCEPT !["D0"] = @ \union pen.asked]
     /\ answers' = answersAfter
     /\ UNCHANGED <<router, server, registrations, prefill>>

\* -- it finds its way

Ask(pen, rid, find, request) == [pen EXCEPT !.finds = Set(@, rid, find), !.asked = @ \union {request}]

DropRoutes(pen) == [pen EXCEPT !.topology = FALSE, !.endpoints = {}]

FinishSetUp(pen, rid, node) ==
  LET known == [pen EXCEPT !.known = Set(@, Own(rid)[1], node)]
  IN Deliver(Deliver(known, "RoutesResolved", Own(rid), <<{0}, 1>>), "SetupFinished", Own(rid), <<>>)

FailSetUp(pen, rid, cause) ==
  Deliver(Deliver(pen, "RouteUnavailable", Own(rid), <<cause>>), "SetupFinished", Own(rid), <<>>)

\* The DP rank is known: where does it listen?
Fetch(pen, rid, resolution) ==
  LET node == DpNode(resolution.rank[1])
      find == [asks |-> "endpoint", resolution |-> resolution, node |-> node]
  IN IF node \in pen.endpoints THEN FinishSetUp(pen, rid, node)
     ELSE Ask(pen, rid, find, <<"GET /route", rid, node>>)

\* The topology is known: which DP rank?
Resolve(pen, rid) ==
  LET room == Own(rid)[1]
      step == Step("resolution", Start("resolution"), "TopologyLearned", <<DpRanks, TRUE, Home(room)>>)
      find == [asks |-> "rank", resolution |-> step.state, node |-> ""]
  IN IF step.orders = <<>> THEN Fetch(pen, rid, step.state)
     ELSE Ask(pen, rid, find, <<"POST /query_dp_ranks", rid, room>>)

Find(pen, rid) ==
  LET find == [asks |-> "topology", resolution |-> Start("resolution"), node |-> ""]
  IN IF pen.topology THEN Resolve(pen, rid) ELSE Ask(pen, rid, find, <<"GET /route", rid, "">>)

GoOn(pen, rid, answer) ==
  LET find == pen.finds[rid]
      known == IF answer[3] = "200" THEN answer[4] ELSE <<>>
      step == Step("resolution", find.resolution, "DpRankAnswered", known)
  IN CASE find.asks = "rank" ->
            IF step.orders = <<>> THEN Fetch(pen, rid, step.state)
            ELSE [pen EXCEPT !.finds[rid] = [find EXCEPT !.asks = "rank again", !.resolution = step.state]]
       [] find.asks = "topology" ->
            IF answer[4] = "200" THEN Resolve([pen EXCEPT !.topology = TRUE], rid)
            ELSE [pen EXCEPT !.finds[rid].asks = "topology again"]
       [] find.asks = "endpoint" ->
            IF answer[4] = "200" THEN FinishSetUp([pen EXCEPT !.endpoints = @ \union {find.node}], rid, find.node)
            ELSE LET waits == [DropRoutes(pen) EXCEPT !.finds[rid].asks = "endpoint again"]
                 IN IF Rules.endpoint_patience = "none" THEN FailSetUp(waits, rid, "route_unavailable") ELSE waits
       [] OTHER -> pen

\* An answer; nobody may be waiting for it any more.
DecodeAnswered == \E answer \in answers["D0"] :
  LET rid == answer[2]
  IN DecodeDone(IF rid \in DOMAIN decode.finds /\ ~decode.stopped THEN GoOn(Receiver, rid, answer) ELSE Receiver,
                chan, [answers EXCEPT !["D0"] = @ \ {answer}])

IsFinding(rid, asks) ==
  rid \in DOMAIN decode.finds /\ decode.finds[rid].asks = asks /\ ~decode.stopped /\ ~IsBlocked

\* Of all the times that it asks again, the one that gets another answer.
CanAskForTopology(rid) == IsFinding(rid, "topology again") /\ server.up /\ server.registry.state = "Ready"
CanAskForRank(rid) == IsFinding(rid, "rank again") /\ server.up /\ DpRank(Own(rid)[1]) # <<>>
CanAskForEndpoint(rid) ==
  /\ IsFinding(rid, "endpoint again") /\ server.up /\ server.registry.state = "Ready"
  /\ \E entry \in server.registry.ranks : entry[1] = decode.finds[rid].node
AskAgain(rid) ==
  LET find == decode.finds[rid]
      step == Step("resolution", find.resolution, "RetryDue", <<>>)
      forTopology == Ask(Receiver, rid, [find EXCEPT !.asks = "topology"], <<"GET /route", rid, "">>)
      forRank == Ask(Receiver, rid, [find EXCEPT !.asks = "rank", !.resolution = step.state],
                     <<"POST /query_dp_ranks", rid, Own(rid)[1]>>)
      forEndpoint == Ask(Receiver, rid, [find EXCEPT !.asks = "endpoint"], <<"GET /route", rid, find.node>>)
  IN \/ CanAskForTopology(rid) /\ DecodeDone(forTopology, chan, answers)
     \/ CanAskForEndpoint(rid) /\ DecodeDone(forEndpoint, chan, answers)
     \/ CanAskForRank(rid) /\ DecodeDone(forRank, chan, answers)

\* All the times that it may ask for the topology, or for an endpoint, are used up.
SetsUp(rid) == RoomAt(decode, Own(rid)[1]).local.poll = "Bootstrapping"
StopAsking(rid) ==
  /\ SetsUp(rid)
  /\ \/ /\ IsFinding(rid, "topology again")
        /\ DecodeDone(FailSetUp(Receiver, rid, "topology_unavailable"), chan, answers)
     \/ /\ IsFinding(rid, "endpoint again")
        /\ DecodeDone(FailSetUp(Receiver, rid, "endpoint_unavailable"), chan, answers)

\* -- what it is told

DecodeOpens(pen, rid) ==
  LET queued == [Queue(pen, rid, "RequestArrived") EXCEPT !.opening = rid]
      opened == Deliver(queued, "RequestOpened", Own(rid), <<>>)
  IN IF IsLegal(queued, "RequestOpened", Own(rid), <<>>) THEN Find(opened, rid) ELSE opened

DecodeCancels(pen, rid, cause) ==
  Deliver([pen EXCEPT !.entries[rid].aborted = IF @ = "" THEN cause ELSE @], "AbortRequested", Own(rid), <<cause>>)

DecodeHearsRouter ==
  LET link == <<"R", "D0">>
      message == Head(chan[link])
      rid == message[2]
      pen == Receiver
  IN /\ chan[link] # <<>> /\ ~IsBlocked
     /\ DecodeDone(
          IF pen.stopped THEN pen
          ELSE IF message[1] = "Open" THEN DecodeOpens(pen, rid)
          ELSE IF rid \in DOMAIN pen.entries THEN DecodeCancels(pen, rid, message[3])
          ELSE pen, Taken(chan, link), answers)

DecodeHears(node) ==
  LET link == <<node, "D0">>
      message == Head(chan[link])
      pen == Receiver
  IN /\ chan[link] # <<>> /\ ~IsBlocked
     /\ DecodeDone(
          IF pen.stopped THEN pen
          ELSE IF message[1] = "Status" THEN Deliver(pen, "StatusReceived", message[2], <<0, message[3]>>)
          ELSE Deliver(pen, "AbortAcknowledged", message[2], <<0>>), Taken(chan, link), answers)

DecodeDeadline(name) == \E own \in Rings(decode, name) :
  LET forgets == name = "waiting" /\ Rules.route_cache = "by_address"
  IN /\ ~IsBlocked
     /\ DecodeDone(Ring(IF forgets THEN DropRoutes(Receiver) ELSE Receiver, own, name), chan, answers)

\* -- its queues

\* The preallocation queue: give memory and tell prefill where, or drop.
CanReserve(rid) == InQueue(decode, rid, "Preallocation") /\ ~IsBlocked /\ Report(decode, rid).poll # 1
Reserve(rid) ==
  LET pen == Receiver
      own == Own(rid)
      poll == Report(pen, rid).poll
      granted == Queue(pen, rid, "MemoryGranted")
      reserved == Deliver(granted, "PagesReserved", own, <<>>)
      sent == Deliver(reserved, "MetadataSent", own, <<>>)
      published == IF IsLegal(reserved, "MetadataSent", own, <<>>)
                   THEN Tell(sent, sent.known[own[1]], <<"Metadata", own>>) ELSE sent
  IN /\ CanReserve(rid)
     /\ DecodeDone(IF poll = 0 THEN Drop(pen, rid, "decode")
                   ELSE IF RoomAt(pen, own[1]).local.poll = "WaitingForInput" THEN published
                   ELSE granted, chan, answers)

\* The transfer queue: decode the request and be done with it, or drop it.
CanSettle(rid) == InQueue(decode, rid, "Transfer") /\ ~IsBlocked /\ Report(decode, rid).poll \in {0, 4}
SettleRequest(rid) ==
  LET pen == Receiver
      poll == Report(pen, rid).poll
      cleared == Deliver(Queue(pen, rid, "TransferAgreed"), "Cleared", Own(rid), <<>>)
  IN /\ CanSettle(rid)
     /\ DecodeDone(IF poll = 0 THEN Drop(pen, rid, "decode")
                   ELSE Tell(Queue(cleared, rid, "GenerationFinished"), "R", <<"FirstToken", rid>>), chan, answers)

\* ------------------------------------------------------------------------------------------- the whole cluster

Nobody == [stopped |-> FALSE, rooms |-> <<>>, timers |-> {}, entries |-> <<>>, known |-> <<>>]
Links == UNION {{<<"R", node>>, <<node, "R">>, <<node, "D0">>, <<"D0", node>>} : node \in Nodes}
         \union {<<"R", "D0">>, <<"D0", "R">>}
AllRegistered == [state |-> "Ready", ranks |-> {<<node, 0>> : node \in Nodes}, puts |-> DpRanks]

Init ==
  /\ router = [healed |-> FALSE, requests |-> <<>>]
  /\ server = IF StartsLate THEN Blank(-1, FALSE) ELSE [Blank(0, TRUE) EXCEPT !.registry = AllRegistered]
  /\ registrations = [node \in Nodes |-> [
       registration |-> IF StartsLate THEN Start("registration") ELSE [state |-> "Registered", attempt |-> 1, replaced |-> FALSE],
       retry |-> FALSE, server |-> [state |-> "Alive", epoch |-> <<0>>, misses |-> 0]]]
  /\ prefill = [node \in Nodes |-> Nobody]
  /\ decode = [topology |-> FALSE, endpoints |-> {}, finds |-> <<>>] @@ Nobody
  /\ chan = [link \in Links |-> <<>>]
  /\ requests = [client \in Clients |-> {}]
  /\ answers = [client \in Clients |-> {}]
  /\ faults = Budget

PrefillSteps(node) ==
  \/ BeginToRegister(node) \/ RegistrationAnswered(node) \/ Probe(node)
  \/ PrefillHearsRouter(node) \/ PrefillHearsDecode(node)
  \/ \E rid \in Rids : Run(node, rid) \/ PrefillIsDoneWith(node, rid)

DecodeSteps ==
  \/ DecodeHearsRouter \/ DecodeAnswered
  \/ \E node \in Nodes : DecodeHears(node)
  \/ \E rid \in Rids : AskAgain(rid) \/ Reserve(rid) \/ SettleRequest(rid)

OtherSteps ==
  \/ \E rid \in Rids : Dispatch(rid, Home(Requests[rid].room))
  \/ \E client \in Clients : RouterHears(client) \/ ServerAnswers(client)
  \/ Listen
  \/ DecodeSteps
  \/ \E node \in Nodes : PrefillSteps(node)

Steps == Heal \/ (OtherSteps /\ UNCHANGED faults)

PrefillTimers == {"bootstrap", "transfer", "announced"}
DecodeTimers == {"bootstrap", "admission", "waiting", "drain"}

Timer ==
  \/ \E node \in Nodes : RegisterAgain(node) \/ \E name \in PrefillTimers : PrefillDeadline(node, name)
  \/ \E name \in DecodeTimers : DecodeDeadline(name)
  \/ \E rid \in Rids : StopAsking(rid)

\* Is a step possible, is a timer running? The same as ENABLED Steps and ENABLED Timer, which TLC takes minutes to find.
IsOut(link) == chan[link] # <<>>
DecodeCanHear(link) == IsOut(link) /\ ~IsBlocked
CanAskAgain(rid) == CanAskForTopology(rid) \/ CanAskForEndpoint(rid) \/ CanAskForRank(rid)

StepEnabled ==
  \/ CanHeal \/ ~server.up \/ DecodeCanHear(<<"R", "D0">>) \/ answers["D0"] # {}
  \/ \E client \in Clients : requests[client] # {} \/ IsOut(<<client, "R">>)
  \/ \E rid \in Rids : CanDispatch(rid) \/ CanAskAgain(rid) \/ CanReserve(rid) \/ CanSettle(rid)
  \/ \E node \in Nodes :
       \/ CanBegin(node) \/ CanProbe(node) \/ answers[node] # {}
       \/ IsOut(<<"R", node>>) \/ IsOut(<<"D0", node>>) \/ DecodeCanHear(<<node, "D0">>)
       \/ \E rid \in Rids : CanRun(node, rid) \/ CanBeDoneWith(node, rid)

PrefillCanRing(node, name) == Rings(prefill[node], name) # {}
DecodeCanRing(name) == Rings(decode, name) # {} /\ ~IsBlocked
CanStopAsking(rid) == SetsUp(rid) /\ (IsFinding(rid, "topology again") \/ IsFinding(rid, "endpoint again"))

TimerEnabled ==
  \/ \E node \in Nodes : registrations[node].retry \/ \E name \in PrefillTimers : PrefillCanRing(node, name)
  \/ \E name \in DecodeTimers : DecodeCanRing(name)
  \/ \E rid \in Rids : CanStopAsking(rid)

\* Deadlines are patient: they pass when nothing else is left to happen.
Deadlines == ~StepEnabled /\ Timer /\ UNCHANGED faults

Spend(kind) ==
  /\ kind \in DOMAIN faults /\ faults[kind] > 0 /\ faults.total > 0
  /\ faults' = [faults EXCEPT ![kind] = @ - 1, !.total = @ - 1]

Faults ==
  \/ Spend("slowness") /\ Timer
  \/ Spend("dp_override") /\ \E rid \in Rids : \E dp \in Dps \ {Home(Requests[rid].room)} : Dispatch(rid, dp)
  \/ Spend("bootstrap_crash") /\ Die
  \/ Spend("answer_lost") /\ \E client \in Clients : AnswerIsLost(client)
  \/ Spend("http_error") /\ \E client \in Clients : ServerHasError(client)

Next == Steps \/ Deadlines \/ Faults

Spec == Init /\ [][Next]_vars

\* Each move is fair on its own, a deadline only where it is possible: WF_vars(action) with ENABLED written out. (A
\* deadline that passes early counts as one here; that makes no difference, because faults end.)
Fairness ==
  /\ []<>~CanHeal \/ []<><<Heal>>_vars
  /\ []<>server.up \/ []<><<Listen>>_vars
  /\ []<>~DecodeCanHear(<<"R", "D0">>) \/ []<><<DecodeHearsRouter>>_vars
  /\ []<>(answers["D0"] = {}) \/ []<><<DecodeAnswered>>_vars
  /\ \A client \in Clients :
       /\ []<>~IsOut(<<client, "R">>) \/ []<><<RouterHears(client)>>_vars
       /\ []<>(requests[client] = {}) \/ []<><<ServerAnswers(client)>>_vars
  /\ \A node \in Nodes :
       /\ []<>~CanBegin(node) \/ []<><<BeginToRegister(node)>>_vars
       /\ []<>(answers[node] = {}) \/ []<><<RegistrationAnswered(node)>>_vars
       /\ []<>~CanProbe(node) \/ []<><<Probe(node)>>_vars
       /\ []<>~IsOut(<<"R", node>>) \/ []<><<PrefillHearsRouter(node)>>_vars
       /\ []<>~IsOut(<<"D0", node>>) \/ []<><<PrefillHearsDecode(node)>>_vars
       /\ []<>~DecodeCanHear(<<node, "D0">>) \/ []<><<DecodeHears(node)>>_vars
       /\ []<>(StepEnabled \/ ~registrations[node].retry) \/ []<><<RegisterAgain(node)>>_vars
       /\ \A name \in PrefillTimers :
            []<>(StepEnabled \/ ~PrefillCanRing(node, name)) \/ []<><<PrefillDeadline(node, name)>>_vars
       /\ \A rid \in Rids :
            /\ []<>~CanRun(node, rid) \/ []<><<Run(node, rid)>>_vars
            /\ []<>~CanBeDoneWith(node, rid) \/ []<><<PrefillIsDoneWith(node, rid)>>_vars
  /\ \A name \in DecodeTimers : []<>(StepEnabled \/ ~DecodeCanRing(name)) \/ []<><<DecodeDeadline(name)>>_vars
  /\ \A rid \in Rids :
       /\ []<>~CanDispatch(rid) \/ []<><<Dispatch(rid, Home(Requests[rid].room))>>_vars
       /\ []<>~CanAskAgain(rid) \/ []<><<AskAgain(rid)>>_vars
       /\ []<>~CanReserve(rid) \/ []<><<Reserve(rid)>>_vars
       /\ []<>~CanSettle(rid) \/ []<><<SettleRequest(rid)>>_vars
       /\ []<>(StepEnabled \/ ~CanStopAsking(rid)) \/ []<><<StopAsking(rid)>>_vars


FairSpec == Spec /\ Fairness

\* ------------------------------------------------------------------------------------------------- invariants

Live == {"Bootstrapping", "WaitingForInput", "Transferring"}
IsLive(process, rid) == Own(rid)[1] \in DOMAIN process.rooms /\ process.rooms[Own(rid)[1]].local.poll \in Live
IsAnswered(rid) == rid \in DOMAIN router.requests /\ router.requests[rid].state.state = "Answered"
Resting == ~StepEnabled /\ ~TimerEnabled

\* S6: once nothing but a deadline is left to happen, decode waits for no rank that took its pages by mistake.
S6 == StepEnabled \/ \A rid \in DOMAIN router.requests :
  LET room == Own(rid)[1]
  IN ~(/\ IsLive(decode, rid) /\ room \in DOMAIN decode.known
       /\ decode.known[room] # router.requests[rid].node
       /\ room \in DOMAIN prefill[decode.known[room]].rooms
       /\ prefill[decode.known[room]].rooms[room].local.arrived # {})

S10 == ~decode.stopped /\ \A node \in Nodes : ~prefill[node].stopped

\* L4: no request that comes after the last fault is answered with a failure (that it is answered at all is L4Answered).
L4 == \A rid \in Rids : Requests[rid].healed /\ IsAnswered(rid) => router.requests[rid].state.cause = "None"

\* L6: a scheduler that stands still never waits for an answer that does not come.
L6 == ~(IsBlocked /\ \E answer \in answers["D0"] : answer[1] = "GET /route" /\ answer[4] = "timeout")

\* O2: the server says Ready only with every rank in its table; no engine that gave up registering says it is healthy.
O2 == /\ server.registry.state = "Ready" => Cardinality(server.registry.ranks) = DpRanks
      /\ Rules.health = "process_alive" => \A node \in Nodes : registrations[node].registration.state # "Exhausted"

\* R1: when all is over, nothing is left but tombstones, and the search for the prefill ranks of such.
IsEmpty(process) ==
  /\ process.entries = <<>> /\ process.timers = {}
  /\ \A room \in DOMAIN process.rooms : process.rooms[room].local.poll = "Retired"
IsFound == \A rid \in DOMAIN decode.finds : RoomAt(decode, Own(rid)[1]).local.poll = "Retired"
R1 == Resting => IsEmpty(decode) /\ IsFound /\ \A node \in Nodes : IsEmpty(prefill[node])

\* L1: every request that was dispatched is answered, and is live on neither side in the end.
Ended(rid) == IsAnswered(rid) /\ ~IsLive(decode, rid) /\ \A node \in Nodes : ~IsLive(prefill[node], rid)
L1 == \A rid \in Rids : (rid \in DOMAIN router.requests) ~> [](Ended(rid))

L4Answered == \A rid \in Rids : (Requests[rid].healed /\ router.healed) ~> IsAnswered(rid)
================================================================================
