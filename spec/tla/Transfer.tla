-------------------------------- MODULE Transfer --------------------------------
(* Whole requests between one-rank engines, from dispatch to the release of the last page.

   The twin of sim/explorer/transfer.py, written by hand from the same words. What a rank decides comes from
   Machine.tla; this module says who hears what when, what an order does, and what the environment may do. Under the
   same model, profile and budget both have the same reachable states, one for one; `kvpoll check` compares them.

   Constants
     Rules      the rules of a profile (Machine.tla)
     Requests   a set of [rid, room, attempt, prefill, decode, healed]; healed: sent only after the last fault
     Prefill    names of prefill engines;  Decode: names of decode engines;  Pages: pages in each engine's pool
     Faults     how many faults of each kind may still come: [kind |-> number], with their sum or less in `total`
     Watched    ids of the invariants to be judged (Witness.tla); {} when only states are to be counted

   How to read it: Pen.tla says what a process does when a fact reaches one of its rooms. Each action below takes the
   pen of a process, lets it do one thing, and ends with `Done`. Next, near the end, lists the actions; each is one
   move of the Python model.

   Assumptions
     A1  A channel keeps order and loses nothing, except when its link breaks or its receiver dies. Of a broken link
         both ends learn, by a message LinkRestored. An equal message already in flight stands for both.
     A2  Deadlines are patient: one passes when no step that the protocol owes is possible, or early, which costs a
         fault ("slowness": whatever it waited for took longer).
     A3  Tombstones outlive every message. Deadlines of requests sent after the last fault never pass.
     A4  One page a request, one write a request (one chunk). The aux row of a page bears the page's number.
     A5  What a dead process has written keeps landing nowhere: a process that dies takes its posted writes with it,
         and a write to a dead process fails.
     A6  The router does not die. It learns of a death by the reset of its connections, one for each request. *)
EXTENDS Pen, Witness

CONSTANT Faults

VARIABLES
  router,  \* [deaths, healed, requests: rid -> state of the router's machine, resets: {<<node, rid>>}]
  engine,  \* node -> process
  life,    \* node -> [up, epoch, listed]: what others can find out; listed: the epoch that the bootstrap server knows
  chan,    \* <<from, to>> -> messages under way, first one first
  wire,    \* <<prefill, decode>> -> [up, epoch, writes]: posted writes, and the life of the target they can reach
  left     \* kind of fault -> how many may still come

protocol == <<router, engine, life, chan, wire, left>>
vars == <<router, engine, life, chan, wire, left, seen>>

\* ------------------------------------------------------------------------------------------ how an action ends

\* A1: an equal message in flight stands for both.
Sending(messages, message) ==
  IF \E i \in DOMAIN messages : messages[i] = message THEN messages ELSE Append(messages, message)

RECURSIVE SendAll(_, _, _)
SendAll(channels, from, messages) ==
  IF messages = <<>> THEN channels
  ELSE SendAll([channels EXCEPT ![<<from, Head(messages)[1]>>] = Sending(@, Head(messages)[2])], from, Tail(messages))

Pen(node) == PenOf(node, engine[node])

\* The pen's work becomes the next state; `channels` is what is under way before it sends anything.
DoneWith(pen, channels) ==
  /\ engine' = [engine EXCEPT ![pen.node] = pen.p]
  /\ chan' = SendAll(channels, pen.node, pen.sent)
  /\ Witnessing(pen.told)

Done(pen) == DoneWith(pen, chan) /\ UNCHANGED <<router, life, wire, left>>

HasMail(from, to) == chan[<<from, to>>] # <<>>
Received(from, to) == [chan EXCEPT ![<<from, to>>] = Tail(@)]

\* One fault of this kind; a conjunct of every action that the environment is not owed.
Fault(kind) ==
  /\ kind \in DOMAIN left /\ left[kind] > 0 /\ left.total > 0
  /\ left' = [left EXCEPT ![kind] = @ - 1, !.total = @ - 1]

\* ------------------------------------------------------------------------------------------ the router

MayDispatch(rid) == rid \notin DOMAIN router.requests /\ (Asked[rid].healed => router.healed)

Dispatch(rid) ==
  /\ MayDispatch(rid)
  /\ router' = [router EXCEPT !.requests = Put(@, rid, Start("router"))]
  /\ chan' = SendAll(chan, "R", <<<<Asked[rid].prefill, <<"Open", rid>>>>, <<Asked[rid].decode, <<"Open", rid>>>>>>)
  /\ Witnessing(<<[event |-> "Admitted", pair |-> Pair(rid), prefill |-> Asked[rid].prefill,
                   decode |-> Asked[rid].decode]>>)
  /\ UNCHANGED <<engine, life, wire, left>>

CancelledLegs(rid, argument) ==
  CASE argument = <<"prefill">> -> <<Asked[rid].prefill>>
    [] argument = <<"decode">> -> <<Asked[rid].decode>>
    [] OTHER -> <<Asked[rid].prefill, Asked[rid].decode>>

RECURSIVE RouterOrders(_, _, _)
RouterOrders(rid, orders, after) ==
  LET order == Head(orders)
      cause == IF after.cause = "None" THEN "cancelled" ELSE after.cause
      nodes == CancelledLegs(rid, order[2])
      rest == RouterOrders(rid, Tail(orders), after)
      sent == IF order[1] = "CancelLeg" THEN [i \in DOMAIN nodes |-> <<nodes[i], <<"Cancel", rid, cause>>>>] ELSE <<>>
      told == IF order[1] = "AnswerClient"
              THEN <<[event |-> "Resulted", pair |-> Pair(rid), ok |-> order[2] = <<"ok">>, cause |-> after.cause]>>
              ELSE <<>>
  IN IF orders = <<>> THEN [sent |-> <<>>, told |-> <<>>]
     ELSE [sent |-> sent \o rest.sent, told |-> told \o rest.told]

\* The router's machine steps for one request; `before` is the router, `channels` what is under way.
Route(before, rid, fact, detail, channels) ==
  LET made == Step("router", before.requests[rid], fact, detail)
      ordered == RouterOrders(rid, made.orders, made.state)
  IN /\ router' = [before EXCEPT !.requests[rid] = made.state]
     /\ chan' = SendAll(channels, "R", ordered.sent)
     /\ Witnessing(ordered.told)
     /\ UNCHANGED <<engine, life, wire>>

RouterHears(node) ==
  LET message == Head(chan[<<node, "R">>])
  IN /\ HasMail(node, "R")
     /\ IF message[1] = "FirstToken" THEN Route(router, message[2], "DecodeAnswered", None, Received(node, "R"))
        ELSE Route(router, message[2], "LegFailed", <<message[3], message[4]>>, Received(node, "R"))
     /\ UNCHANGED left

MayBeCutOff(node) == \E reset \in router.resets : reset[1] = node

RouterIsCutOff(node) ==
  /\ \E reset \in router.resets :
       /\ reset[1] = node
       /\ Route([router EXCEPT !.resets = @ \ {reset}], reset[2], "LegFailed", <<Side[node], "engine_crashed">>, chan)
  /\ UNCHANGED left

ClientLeaves(rid) ==
  /\ rid \in DOMAIN router.requests
  /\ Fault("client_abort")
  /\ Route(router, rid, "ClientLeft", None, chan)

MayHeal == ~router.healed /\ \E rid \in Rids : Asked[rid].healed

\* No more faults. `Heal`, below, is patient: whoever could notice a fault has had the time to.
HealNow ==
  /\ router' = [router EXCEPT !.healed = TRUE]
  /\ left' = [kind \in DOMAIN left |-> 0]
  /\ Witnessing(<<>>)
  /\ UNCHANGED <<engine, life, chan, wire>>

\* ------------------------------------------------------------------------------------------ both sides

Works(process) == process.up /\ ~process.stopped

\* This side gives a request up.
GiveUp(pen, rid, cause) ==
  LET own == Own(rid, pen.p)
      noted == [pen EXCEPT !.p.entries[rid].aborted = IF @ = "" THEN cause ELSE @]
  IN IF pen.node \in Prefill THEN Deliver(pen, "AbortRequested", own, <<cause>>, None)
     ELSE IF pen.p.entries[rid].state = "Running" THEN Advance(Release(pen, own), rid, "DropAgreed")
     ELSE Deliver(noted, "AbortRequested", own, <<cause>>, None)

Open(pen, rid) ==
  LET state == Step(QueueOf[pen.node], Start(QueueOf[pen.node]), "RequestArrived", <<>>).state.state
      entry == [state |-> state, aborted |-> "", rejected |-> FALSE]
      known == rid \in DOMAIN pen.p.entries
      queued == [pen EXCEPT
        !.p.entries = IF known THEN [@ EXCEPT ![rid].state = state] ELSE Put(@, rid, entry), !.opening = rid]
  IN Deliver(queued, "RequestOpened", Own(rid, pen.p), IF pen.node \in Prefill THEN <<1>> ELSE None, None)

Obey(pen, message) ==
  LET rid == message[2]
  IN CASE ~pen.p.up /\ message[1] = "Open" -> Send(pen, "R", <<"Failed", rid, Side[pen.node], "connection_refused">>)
       [] ~Works(pen.p) -> pen
       [] message[1] = "Open" -> Open(pen, rid)
       [] message[1] = "Cancel" /\ rid \in DOMAIN pen.p.entries -> GiveUp(pen, rid, message[3])
       [] OTHER -> pen

HearRouter(node) ==
  /\ HasMail("R", node)
  /\ DoneWith(Obey(Pen(node), Head(chan[<<"R", node>>])), Received("R", node))
  /\ UNCHANGED <<router, life, wire, left>>

\* Prefill remembers where to write and whom to acknowledge, for as long as there is a room.
Note(pen, incarnation, field, value) ==
  [pen EXCEPT !.p.known = Put(@, Key(incarnation), [KnownOf(pen.p, Key(incarnation)) EXCEPT ![field] = value])]

Tidy(pen, incarnation) ==
  IF /\ incarnation[1] \in DOMAIN pen.p.rooms
     /\ Key(pen.p.rooms[incarnation[1]].incarnation) = Key(incarnation)
  THEN pen ELSE Forget(pen, incarnation)

TakeIn(pen, other, message) ==
  LET meant == message[2]
      origin == <<other>> \o SubSeq(message, 3, Len(message))
  IN CASE message[1] = "Status" -> Deliver(pen, "StatusReceived", meant, <<message[3], message[4]>>, None)
       [] message[1] = "Acknowledged" -> Deliver(pen, "AbortAcknowledged", meant, <<message[3]>>, None)
       [] message[1] = "Metadata" ->
            Tidy(Deliver(Note(pen, meant, "destination", origin), "DestinationRegistered", meant, <<0, 1>>, origin),
                 meant)
       [] message[1] = "Abort" ->
            Tidy(Deliver(Note(pen, meant, "asker", origin), "PeerAborted", meant, <<0>>, origin), meant)
       [] message[1] = "LinkRestored" -> TellAll(pen, other, "LinkRestored", None)

Hearing(node, other, channels) ==
  LET pen == Pen(node)
  IN /\ DoneWith(IF Works(pen.p) THEN TakeIn(pen, other, Head(chan[<<other, node>>])) ELSE pen, channels)
     /\ UNCHANGED <<router, life, wire>>

HearPeer(node, other) ==
  /\ HasMail(other, node)
  /\ Hearing(node, other, Received(other, node))
  /\ UNCHANGED left

HearPeerTwice(node, other) ==
  /\ HasMail(other, node)
  /\ engine[node].up
  /\ Fault("message_duplicate")
  /\ Hearing(node, other, chan)

\* What a probe's answer leads to: orders of the failure detector.
RECURSIVE Declare(_, _, _, _)
Declare(pen, orders, other, epoch) ==
  LET forgot == IF pen.node \in Decode THEN [pen EXCEPT !.p.routes = Drop(@, other)] ELSE pen
      told == IF Head(orders)[1] = "DeclareSuspected" THEN TellAll(forgot, other, "PeerSuspected", None)
              ELSE TellAll(forgot, other, "PeerDied", <<epoch>>)
  IN IF orders = <<>> THEN pen ELSE Declare(told, Tail(orders), other, epoch)

Probed(node, other) ==
  IF life[other].up THEN Step("peer", engine[node].peers[other], "ProbeAnswered", <<life[other].epoch>>)
  ELSE Step("peer", engine[node].peers[other], "ProbeMissed", None)

\* A probe that would teach nothing is not sent.
MayProbe(node, other) ==
  /\ Works(engine[node])
  /\ other \in DOMAIN engine[node].peers
  /\ Probed(node, other).state # engine[node].peers[other]

Probe(node, other) ==
  LET made == Probed(node, other)
      pen == Pen(node)
  IN /\ MayProbe(node, other)
     /\ Done(Declare([pen EXCEPT !.p.peers[other] = made.state], made.orders, other, life[other].epoch))

MayRing(timer, node, name) ==
  /\ timer[2] = name
  /\ ~engine[node].stopped
  /\ \A request \in Requests : request.healed => PairOf(timer[1]) # <<request.room, request.attempt>>  \* A3

Ring(node, timer) ==
  LET pen == [Pen(node) EXCEPT !.p.timers = @ \ {timer}]
      known == pen.p.known[Key(timer[1])]
      forgets == timer[2] = "waiting" /\ Rules.route_cache = "by_address" /\ Key(timer[1]) \in DOMAIN pen.p.known
      forgot == IF forgets THEN [pen EXCEPT !.p.routes = Drop(@, known[1])] ELSE pen
  IN /\ DoneWith(Deliver(forgot, "DeadlineReached", timer[1], <<timer[2]>>, None), chan)
     /\ UNCHANGED <<router, life, wire>>

DeadlinePassesEarly(node, name) ==
  \E timer \in engine[node].timers : MayRing(timer, node, name) /\ Fault("slowness") /\ Ring(node, timer)

EngineGivesUp(node, rid) ==
  /\ rid \in DOMAIN engine[node].entries
  /\ ~engine[node].stopped
  /\ Fault(IF node \in Prefill THEN "prefill_abort" ELSE "decode_abort")
  /\ DoneWith(GiveUp(Pen(node), rid, "aborted"), chan)
  /\ UNCHANGED <<router, life, wire>>

\* Timers that compare the wall clock do not ring in any time that matters when it is set far back.
ClockIsSetBack(node) ==
  /\ engine[node].timers # {}
  /\ Fault("clock_offset")
  /\ engine' = IF Rules.deadline_clock = "wall" THEN [engine EXCEPT ![node].timers = {}] ELSE engine
  /\ Witnessing(<<>>)
  /\ UNCHANGED <<router, life, chan, wire>>

\* ------------------------------------------------------------------------------------------ lives

Cut(writes) == {[write EXCEPT !.state = "cut"] : write \in writes}

Die(node) ==
  LET open == {rid \in Served[node] : rid \in DOMAIN router.requests /\ router.requests[rid].state # "Answered"}
      mine == {WireOf(node, other) : other \in Others[node]}
      lost == {<<other, node>> : other \in Others[node] \union {"R"}}
  IN /\ engine[node].up
     /\ Fault(IF node \in Prefill THEN "prefill_crash" ELSE "decode_crash")
     /\ engine' = [engine EXCEPT ![node] = Blank(@.epoch, FALSE)]
     /\ life' = [life EXCEPT ![node].up = FALSE]
     /\ chan' = [ends \in DOMAIN chan |-> IF ends \in lost THEN <<>> ELSE chan[ends]]
     /\ router' = [router EXCEPT !.deaths = @ + 1, !.resets = @ \union {<<node, rid>> : rid \in open}]
     /\ wire' = [ends \in DOMAIN wire |->
          IF ends \notin mine THEN wire[ends]
          ELSE IF node \in Prefill THEN [wire[ends] EXCEPT !.writes = {}]
          ELSE [wire[ends] EXCEPT !.up = FALSE, !.writes = Cut(@)]]
     /\ Witnessing(<<[event |-> "NodeStopped", node |-> node, epoch |-> engine[node].epoch]>>)

\* The next life, with empty tables, at the same address.
Restart(node) ==
  LET reached == {ends \in DOMAIN wire : ends[2] = node}
  IN /\ ~engine[node].up
     /\ engine' = [engine EXCEPT ![node] = Fresh(node, @.epoch + 1)]
     /\ life' = [life EXCEPT ![node].up = TRUE, ![node].epoch = @ + 1]
     /\ wire' = [ends \in DOMAIN wire |->
          IF ends \in reached THEN [wire[ends] EXCEPT !.up = TRUE, !.epoch = @ + 1] ELSE wire[ends]]
     /\ Witnessing(<<[event |-> "NodeStarted", node |-> node]>>)
     /\ UNCHANGED <<router, chan, left>>

\* The bootstrap server learns of the new life.
MayRegister(node) == life[node].up /\ life[node].listed # life[node].epoch

Register(node) ==
  /\ MayRegister(node)
  /\ life' = [life EXCEPT ![node].listed = life[node].epoch]
  /\ Witnessing(<<>>)
  /\ UNCHANGED <<router, engine, chan, wire, left>>

\* ------------------------------------------------------------------------------------------ schedulers

Numbers == [Failed |-> 0, Bootstrapping |-> 1, WaitingForInput |-> 2, Transferring |-> 3, Success |-> 4,
            Absent |-> 0, Announced |-> 0, Retired |-> 0]

\* What the scheduler sees of a request: the poll of its room, and why it failed.
Report(process, rid) ==
  LET entry == process.entries[rid]
      number == Asked[rid].room
      mine == process.rooms[number]
      isLost == number \notin DOMAIN process.rooms \/ mine.incarnation[2] # Asked[rid].attempt
      report == IF isLost THEN [poll |-> 0, cause |-> "room_lost"]
                ELSE [poll |-> Numbers[mine.local.poll], cause |-> mine.local.cause]
  IN IF entry.rejected THEN [poll |-> 0, cause |-> "room_in_use"]
     ELSE IF entry.aborted # "" /\ report.poll # 0 THEN [poll |-> 0, cause |-> entry.aborted]
     ELSE report

Stands(node, rid, state) ==
  /\ Works(engine[node])
  /\ rid \in DOMAIN engine[node].entries
  /\ engine[node].entries[rid].state = state

\* It has failed, or it is ready and there is a page for it.
MayLeaveQueue(node, rid) ==
  LET poll == Report(engine[node], rid).poll
  IN poll # Numbers.Bootstrapping /\ (poll = Numbers.Failed \/ engine[node].free # {})

HasEnded(node, rid) == Report(engine[node], rid).poll \in {Numbers.Failed, Numbers.Success}

\* A request ends badly here: its room is given up, unless that is over or another's, and cleared.
Abandon(pen, rid, cause) ==
  LET own == Own(rid, pen.p)
      entry == pen.p.entries[rid]
      moved == Advance(pen, rid, "DropAgreed")
      mine == moved.p.rooms[own[1]]
      isMine == own[1] \in DOMAIN moved.p.rooms /\ Key(mine.incarnation) = Key(own)
      failed == IF mine.local.poll \in {"Failed", "Retired"} THEN moved
                ELSE Deliver(moved, "AbortRequested", own, IF cause = "None" THEN None ELSE <<cause>>, None)
      cleared == IF ~entry.rejected /\ isMine THEN Deliver(failed, "Cleared", own, None, None) ELSE moved
  IN Send(cleared, "R", <<"Failed", rid, Side[pen.node], IF cause = "None" THEN "failed" ELSE cause>>)

\* The bootstrap queue of prefill: admit and take pages, or drop.
MayAdmit(node, rid) == Stands(node, rid, "Bootstrap") /\ MayLeaveQueue(node, rid)

Admit(node, rid) ==
  LET report == Report(engine[node], rid)
      own == Own(rid, engine[node])
  IN /\ MayAdmit(node, rid)
     /\ Done(IF report.poll = 0 THEN Abandon(Pen(node), rid, report.cause)
             ELSE Deliver(Reserve(Advance(Pen(node), rid, "AdmissionAgreed"), own), "PagesReserved", own, None, None))

\* The forward pass is over: post the write, if there is somewhere to write to.
PostWrite(node, rid) ==
  LET own == Own(rid, engine[node])
      destination == KnownOf(engine[node], Key(own)).destination
      isReady == destination # None /\ PairOf(own) \in DOMAIN engine[node].held
      pen == Tell(Pen(node), [event |-> "Computed", node |-> node, pair |-> PairOf(own)])
      stepped == Deliver(pen, "WritePosted", own, <<TRUE>>, None)
      isPosted == isReady /\ stepped.legal
      ends == <<node, destination[1]>>
      isReached == wire[ends].up /\ wire[ends].epoch = destination[2][3]
      write == [own |-> own, theirs |-> destination[2], source |-> engine[node].held[PairOf(own)],
                target |-> destination[3], state |-> IF isReached THEN "posted" ELSE "cut"]
      posted == [event |-> "WritePosted", node |-> node, to |-> destination[1], own |-> own,
                 theirs |-> destination[2], source |-> write.source, page |-> write.target]
      after == IF isPosted THEN Tell(stepped, posted) ELSE IF isReady THEN stepped ELSE pen
  IN /\ DoneWith(Advance(after, rid, "ForwardFinished"), chan)
     /\ wire' = IF isPosted THEN [wire EXCEPT ![ends].writes = @ \union {write}] ELSE wire
     /\ UNCHANGED <<router, life, left>>

Compute(node, rid) ==
  LET report == Report(engine[node], rid)
  IN /\ Stands(node, rid, "Waiting")
     /\ IF report.poll = 0 THEN Done(Abandon(Pen(node), rid, report.cause)) ELSE PostWrite(node, rid)

\* The transfer is over on prefill, well or badly.
MayConclude(node, rid) == Stands(node, rid, "Inflight") /\ HasEnded(node, rid)

Conclude(node, rid) ==
  LET report == Report(engine[node], rid)
  IN /\ MayConclude(node, rid)
     /\ Done(IF report.poll = 0 THEN Abandon(Pen(node), rid, report.cause)
             ELSE Deliver(Advance(Pen(node), rid, "TransferAgreed"), "Cleared", Own(rid, engine[node]), None, None))

\* The room of this request is as `holds` says.
RoomIs(node, rid, holds(_)) ==
  LET number == Asked[rid].room
  IN /\ Works(engine[node])
     /\ number \in DOMAIN engine[node].rooms
     /\ PairOf(engine[node].rooms[number].incarnation) = Pair(rid)
     /\ holds(engine[node].rooms[number].local)

\* Is its prefill rank still looked for, to set it up or to tell it of a failure?
Seeks(node, rid) == RoomIs(node, rid, StillLooks)
SetsUp(node, rid) == RoomIs(node, rid, LAMBDA local : local.poll = "Bootstrapping")

MayUse(listed, belief) ==
  Rules.route_cache = "by_address" \/ belief = None \/ listed >= belief[1]

\* GET /route, or the cache; then the set-up call returns.
MayFindRoute(node, rid) ==
  LET peer == Asked[rid].prefill
      belief == IF peer \in DOMAIN engine[node].peers THEN engine[node].peers[peer].epoch ELSE None
  IN /\ Seeks(node, rid)
     /\ peer \in DOMAIN engine[node].routes \/ (life[peer].up /\ MayUse(life[peer].listed, belief))

FindRoute(node, rid) ==
  LET peer == Asked[rid].prefill
      isCached == peer \in DOMAIN engine[node].routes
      epoch == IF isCached THEN engine[node].routes[peer] ELSE life[peer].listed
      own == Own(rid, engine[node])
      pen == [Pen(node) EXCEPT !.p.routes = Put(@, peer, epoch), !.p.known = Put(@, Key(own), <<peer, epoch>>)]
      found == Deliver(pen, "RoutesResolved", own, <<{0}, 1>>, None)
  IN /\ MayFindRoute(node, rid)
     /\ Done(Deliver(found, "SetupFinished", own, None, None))

LoseRoute(node, rid) ==
  LET own == Own(rid, engine[node])
      pen == [Pen(node) EXCEPT !.p.routes = Drop(@, Asked[rid].prefill)]
      failed == Deliver(pen, "RouteUnavailable", own, <<"route_404">>, None)
  IN /\ SetsUp(node, rid)
     /\ Fault("route_failure")
     /\ DoneWith(Deliver(failed, "SetupFinished", own, None, None), chan)
     /\ UNCHANGED <<router, life, wire>>

Granted(pen, rid) ==
  LET own == Own(rid, pen.p)
      reserved == Deliver(Reserve(pen, own), "PagesReserved", own, None, None)
      sent == Deliver(reserved, "MetadataSent", own, None, None)
  IN IF RoomAt(pen.p, own[1]).local.poll # "WaitingForInput" THEN pen
     ELSE IF ~reserved.legal THEN reserved ELSE IF ~sent.legal THEN sent ELSE Publish(sent, own)

\* The preallocation queue of decode: give memory and tell prefill, or drop.
MayGrant(node, rid) == Stands(node, rid, "Preallocation") /\ MayLeaveQueue(node, rid)

Grant(node, rid) ==
  LET report == Report(engine[node], rid)
  IN /\ MayGrant(node, rid)
     /\ Done(IF report.poll = 0 THEN Abandon(Pen(node), rid, report.cause)
             ELSE Granted(Advance(Pen(node), rid, "MemoryGranted"), rid))

FindNoMemory(node, rid) ==
  LET pen == Advance(Pen(node), rid, "MemoryGranted")
  IN /\ MayGrant(node, rid) /\ Report(engine[node], rid).poll # Numbers.Failed
     /\ Fault("allocation_failure")
     /\ DoneWith(Deliver(pen, "AbortRequested", Own(rid, engine[node]), <<"allocation_failed">>, None), chan)
     /\ UNCHANGED <<router, life, wire>>

Committed(pen, own) ==
  LET pair == PairOf(own)
      page == pen.p.held[pair]
      holds == IF pair \in DOMAIN pen.p.held /\ page \in DOMAIN pen.p.contents THEN <<pen.p.contents[page]>> ELSE None
  IN Tell(pen, [event |-> "Committed", node |-> pen.node, pair |-> pair, holds |-> holds])

\* The transfer queue of decode: start to decode, or drop.
MayCommit(node, rid) == Stands(node, rid, "Transfer") /\ HasEnded(node, rid)

Commit(node, rid) ==
  LET report == Report(engine[node], rid)
      own == Own(rid, engine[node])
      begun == Advance(Committed(Pen(node), own), rid, "TransferAgreed")
  IN /\ MayCommit(node, rid)
     /\ Done(IF report.poll = 0 THEN Abandon(Pen(node), rid, report.cause)
             ELSE Send(Deliver(begun, "Cleared", own, None, None), "R", <<"FirstToken", rid>>))

EndDecode(node, rid) ==
  /\ Stands(node, rid, "Running")
  /\ Done(Advance(Release(Pen(node), Own(rid, engine[node])), rid, "GenerationFinished"))

\* ------------------------------------------------------------------------------------------ writes and links

WriteName(write) == <<write.own, write.theirs[3]>>
Landed(write, right) ==
  [event |-> "WriteLanded", node |-> right, pair |-> PairOf(write.theirs), page |-> write.target]
Settled(write) == [event |-> "WriteSettled", write |-> WriteName(write)]

\* The page holds what was written last, whoever owns it now.
Landing(engines, right, write) ==
  IF ~engines[right].up \/ engines[right].epoch # write.theirs[3] THEN engines
  ELSE [engines EXCEPT ![right].contents = Put(@, write.target, PairOf(write.theirs))]

\* A write leaves its state (None: it is over), and prefill hears of it.
WriteMoves(left_, right, write, next, fact, events, lands) ==
  LET pen == Pen(left_)
      heard == IF pen.p.stopped THEN pen ELSE Deliver(pen, fact, write.own, None, None)
      ends == <<left_, right>>
  IN /\ engine' = LET engines == [engine EXCEPT ![left_] = heard.p]
                  IN IF lands THEN Landing(engines, right, write) ELSE engines
     /\ chan' = SendAll(chan, left_, heard.sent)
     /\ Witnessing(events \o heard.told)
     /\ wire' = [wire EXCEPT ![ends].writes =
          (@ \ {write}) \union IF next = "over" THEN {} ELSE {[write EXCEPT !.state = next]}]
     /\ UNCHANGED <<router, life>>

WriteCompletes(left_, right) ==
  /\ \E write \in wire[<<left_, right>>].writes :
       /\ write.state = "posted"
       /\ WriteMoves(left_, right, write, "over", "WriteCompleted", <<Landed(write, right), Settled(write)>>, TRUE)
  /\ UNCHANGED left

\* The target's process is gone: nothing of this write will land.
WriteIsCut(left_, right) ==
  /\ \E write \in wire[<<left_, right>>].writes :
       write.state = "cut" /\ WriteMoves(left_, right, write, "dead", "WriteFailed", <<>>, FALSE)
  /\ UNCHANGED left

\* The writer knows that it failed; bytes may still land.
WriteFails(left_, right) ==
  \E write \in wire[<<left_, right>>].writes :
    /\ write.state = "posted"
    /\ Fault("write_fail")
    /\ WriteMoves(left_, right, write, "failed", "WriteFailed", <<>>, FALSE)

FailedWriteIsOver(left_, right) ==
  /\ \E write \in wire[<<left_, right>>].writes :
       /\ write.state \in {"failed", "dead"}
       /\ WriteMoves(left_, right, write, "over", "WriteSettled", <<Settled(write)>>, FALSE)
  /\ UNCHANGED left

\* It may happen, but nobody is owed it.
FailedWriteLands(left_, right) ==
  \E write \in wire[<<left_, right>>].writes :
    /\ write.state = "failed"
    /\ engine' = Landing(engine, right, write)
    /\ wire' = [wire EXCEPT ![<<left_, right>>].writes = (@ \ {write}) \union {[write EXCEPT !.state = "dead"]}]
    /\ Witnessing(<<Landed(write, right)>>)
    /\ UNCHANGED <<router, life, chan, left>>

LinkBreaks(left_, right) ==
  LET there == <<left_, right>>
      back == <<right, left_>>
  IN /\ chan[there] # <<>> \/ chan[back] # <<>>
     /\ Fault("disconnect")
     /\ chan' = [chan EXCEPT ![there] = <<<<"LinkRestored">>>>, ![back] = <<<<"LinkRestored">>>>]
     /\ Witnessing(<<>>)
     /\ UNCHANGED <<router, engine, life, wire>>

\* ------------------------------------------------------------------------------------------ behaviours

Init ==
  /\ router = [deaths |-> 0, healed |-> FALSE, requests |-> Empty, resets |-> {}]
  /\ engine = [node \in Nodes |-> Fresh(node, 0)]
  /\ life = [node \in Nodes |-> [up |-> TRUE, epoch |-> 0, listed |-> 0]]
  /\ chan = [ends \in ({"R"} \X Nodes) \union (Nodes \X {"R"}) \union Links \union (Decode \X Prefill) |-> <<>>]
  /\ wire = [ends \in Links |-> [up |-> TRUE, epoch |-> 0, writes |-> {}]]
  /\ left = Faults
  /\ UnwitnessedYet

\* What the protocol owes at once.
StepOfRouter == (\E rid \in Rids : Dispatch(rid)) \/ (\E node \in Nodes : RouterHears(node) \/ RouterIsCutOff(node))
StepOfEngine(node) ==
  \/ HearRouter(node) \/ Restart(node) \/ Register(node)
  \/ \E other \in Others[node] : HearPeer(node, other) \/ Probe(node, other)
StepOfPrefill(node, rid) == Admit(node, rid) \/ Compute(node, rid) \/ Conclude(node, rid)
StepOfDecode(node, rid) == FindRoute(node, rid) \/ Grant(node, rid) \/ Commit(node, rid) \/ EndDecode(node, rid)
StepOfWire(left_, right) == WriteCompletes(left_, right) \/ WriteIsCut(left_, right) \/ FailedWriteIsOver(left_, right)

OwedStep ==
  \/ StepOfRouter
  \/ \E node \in Nodes : StepOfEngine(node)
  \/ \E node \in Prefill, rid \in Rids : StepOfPrefill(node, rid)
  \/ \E node \in Decode, rid \in Rids : StepOfDecode(node, rid)
  \/ \E left_ \in Prefill, right \in Decode : StepOfWire(left_, right)

(* ~ENABLED <<OwedStep>>_protocol, in words that TLC understands faster: what each of these actions begins with. A
   write that is posted, cut, failed or dead will always move. *)
MayStep ==
  \/ (\E rid \in Rids : MayDispatch(rid)) \/ (\E node \in Nodes : HasMail(node, "R") \/ MayBeCutOff(node))
  \/ \E node \in Nodes : HasMail("R", node) \/ ~engine[node].up \/ MayRegister(node)
  \/ \E node \in Nodes : \E other \in Others[node] : HasMail(other, node) \/ MayProbe(node, other)
  \/ \E node \in Prefill, rid \in Rids : MayAdmit(node, rid) \/ Stands(node, rid, "Waiting") \/ MayConclude(node, rid)
  \/ \E node \in Decode, rid \in Rids : MayFindRoute(node, rid) \/ MayGrant(node, rid) \/ MayCommit(node, rid)
  \/ \E node \in Decode, rid \in Rids : Stands(node, rid, "Running")
  \/ \E ends \in Links : wire[ends].writes # {}

Idle == ~MayStep

DeadlinePasses(node, name) ==  \* A2
  /\ \E timer \in engine[node].timers : MayRing(timer, node, name) /\ Idle /\ Ring(node, timer)
  /\ UNCHANGED left

Heal == MayHeal /\ Idle /\ HealNow

Environment ==
  \/ \E rid \in Rids : ClientLeaves(rid)
  \/ \E node \in Nodes : ClockIsSetBack(node) \/ Die(node)
  \/ \E node \in Nodes : \E other \in Others[node] : HearPeerTwice(node, other)
  \/ \E node \in Nodes : \E name \in DeadlineNames[Side[node]] : DeadlinePassesEarly(node, name)
  \/ \E node \in Nodes : \E rid \in Served[node] : EngineGivesUp(node, rid)
  \/ \E node \in Decode, rid \in Rids : LoseRoute(node, rid) \/ FindNoMemory(node, rid)
  \/ \E left_ \in Prefill, right \in Decode :
       WriteFails(left_, right) \/ FailedWriteLands(left_, right) \/ LinkBreaks(left_, right)

Next ==
  \/ OwedStep
  \/ Heal
  \/ \E node \in Nodes : \E name \in DeadlineNames[Side[node]] : DeadlinePasses(node, name)
  \/ Environment

(* Everything that the protocol owes happens in the end, if it stays possible: weak fairness, action by action. The
   environment owes nothing. WF_vars(A) is []<>~ENABLED <<A>>_vars \/ []<><<A>>_vars; here what an
   action begins with stands for the ENABLED, which TLC is slow to find out. *)

HasTimer(node, name) == \E timer \in engine[node].timers : MayRing(timer, node, name)
HasWrite(ends, states) == \E write \in wire[ends].writes : write.state \in states

Fairness ==
  /\ ([]<>~(MayHeal /\ Idle)) \/ []<><<Heal>>_vars
  /\ \A rid \in Rids : ([]<>~(MayDispatch(rid))) \/ []<><<Dispatch(rid)>>_vars
  /\ \A node \in Nodes : ([]<>~(HasMail(node, "R"))) \/ []<><<RouterHears(node)>>_vars
  /\ \A node \in Nodes : ([]<>~(MayBeCutOff(node))) \/ []<><<RouterIsCutOff(node)>>_vars
  /\ \A node \in Nodes : ([]<>~(HasMail("R", node))) \/ []<><<HearRouter(node)>>_vars
  /\ \A node \in Nodes : ([]<>~(~engine[node].up)) \/ []<><<Restart(node)>>_vars
  /\ \A node \in Nodes : ([]<>~(MayRegister(node))) \/ []<><<Register(node)>>_vars
  /\ \A node \in Nodes : \A other \in Others[node] : ([]<>~(HasMail(other, node))) \/ []<><<HearPeer(node, other)>>_vars
  /\ \A node \in Nodes : \A other \in Others[node] : ([]<>~(MayProbe(node, other))) \/ []<><<Probe(node, other)>>_vars
  /\ \A node \in Nodes : \A name \in DeadlineNames[Side[node]] :
       ([]<>~(HasTimer(node, name) /\ Idle)) \/ []<><<DeadlinePasses(node, name)>>_vars
  /\ \A node \in Prefill : \A rid \in Served[node] : ([]<>~(MayAdmit(node, rid))) \/ []<><<Admit(node, rid)>>_vars
  /\ \A node \in Prefill : \A rid \in Served[node] :
       ([]<>~(Stands(node, rid, "Waiting"))) \/ []<><<Compute(node, rid)>>_vars
  /\ \A node \in Prefill : \A rid \in Served[node] : ([]<>~(MayConclude(node, rid))) \/ []<><<Conclude(node, rid)>>_vars
  /\ \A node \in Decode : \A rid \in Served[node] :
       ([]<>~(MayFindRoute(node, rid))) \/ []<><<FindRoute(node, rid)>>_vars
  /\ \A node \in Decode : \A rid \in Served[node] : ([]<>~(MayGrant(node, rid))) \/ []<><<Grant(node, rid)>>_vars
  /\ \A node \in Decode : \A rid \in Served[node] : ([]<>~(MayCommit(node, rid))) \/ []<><<Commit(node, rid)>>_vars
  /\ \A node \in Decode : \A rid \in Served[node] :
       ([]<>~(Stands(node, rid, "Running"))) \/ []<><<EndDecode(node, rid)>>_vars
  /\ \A ends \in Links : ([]<>~(HasWrite(ends, {"posted"}))) \/ []<><<WriteCompletes(ends[1], ends[2])>>_vars
  /\ \A ends \in Links : ([]<>~(HasWrite(ends, {"cut"}))) \/ []<><<WriteIsCut(ends[1], ends[2])>>_vars
  /\ \A ends \in Links : ([]<>~(HasWrite(ends, {"failed", "dead"}))) \/ []<><<FailedWriteIsOver(ends[1], ends[2])>>_vars

Spec == Init /\ [][Next]_vars
FairSpec == Spec /\ Fairness

\* ------------------------------------------------------------------------------------------ what must hold

(* S1 ... S12 stand in Witness.tla. These need the protocol's state. *)

\* Nothing but the environment can act.
Quiet ==
  Idle /\ ~MayHeal /\ \A node \in Nodes : \A timer \in engine[node].timers : ~MayRing(timer, node, timer[2])

\* R1 quiesce-zero: then nothing is left on a node that is up.
IsClean(process) ==
  /\ \A number \in DOMAIN process.rooms : process.rooms[number].local.poll = "Retired"
  /\ process.entries = Empty /\ process.timers = {} /\ process.held = Empty
R1 == Quiet => \A node \in Nodes : engine[node].up => IsClean(engine[node])

\* O1 metric-truth: then its gauges, which count the scheduler's queues, say zero.
O1 == Quiet => \A node \in Nodes : engine[node].up => engine[node].entries = Empty

\* L2 propagate, within seconds: when nothing is left to happen but deadlines and faults, nobody still holds what the
\* other side has failed.
L2 == "L2" \in Watched /\ Idle => seen["L2"].memory.owed = {}

\* L1 bounded-end: what a node owes a request, it does not owe for ever.
L1 ==
  \A rid \in Rids, node \in Nodes :
    OwedL1(seen["L1"].memory, Pair(rid), node) ~> ~OwedL1(seen["L1"].memory, Pair(rid), node)
================================================================================
