-------------------------------- MODULE Witness --------------------------------
(* Invariants as monitors of what happens: the twin of spec/invariants/, for events of one-rank engines.

   The protocol's variables say what is; most invariants are about what was. So every action tells its events, and for
   each invariant in `Watched` a monitor folds them into a memory of its own. All of that is in one ghost variable,
   `seen`, which no action reads: with Watched = {} it is constant, and the states that TLC counts are the protocol's.

   seen      id -> [broken, memory]; once broken, a monitor looks no further
   events    [event |-> "Stepped", ...]: see the list below. pair: <<room, attempt>>, in all of them.

     Admitted      pair, prefill, decode: the nodes that serve it          Resulted       pair, ok, cause
     Stepped       node, role, own and meant (incarnations), fact, before and after (polls), isLeaseMoved, cause,
                   isRejected: did it order RejectRequest?
     Reserved      node, pair, page: the aux row has the page's number     Released       the same, and free: how many
     Computed      node, pair                              Committed      node, pair, holds: <<>> or <<pair>>
     WritePosted   node, to, own, theirs, source, page                     WriteLanded    node, pair, page
     WriteSettled  write: <<own, epoch of the target>>                     IllegalFact    node
     NodeStopped   node, epoch                                             NodeStarted    node

   Each monitor is a pair of operators: `Begin` gives its first memory, `Judge(id, memory, event)` gives
   [broken, memory]. The sentences are in spec/invariants/. *)
EXTENDS Integers, Sequences, FiniteSets, TLC

CONSTANT Watched
VARIABLE seen

Live == {"Bootstrapping", "WaitingForInput", "Transferring"}
Over == {"Success", "Failed"}
Gone == {"Absent", "Retired"}
Rank == [Failed |-> 0, Bootstrapping |-> 1, WaitingForInput |-> 2, Transferring |-> 3, Success |-> 4]
IsNumbered(poll) == poll \in Live \union Over
Roomless == {"engine_crashed", "connection_refused", "client_left", "room_in_use"}

\* Memories are partial functions of what has been seen.
With(memory, key, value) == (key :> value) @@ memory
Without(memory, keys) == [key \in DOMAIN memory \ keys |-> memory[key]]

Holds_(memory) == [broken |-> FALSE, memory |-> memory]
If(isBroken, memory) == [broken |-> isBroken, memory |-> memory]
PairOf_(incarnation) == <<incarnation[1], incarnation[2]>>
Place(event) == <<event.node, event.own[1]>>

\* S2 generation: a fact meant for another incarnation moves nothing.
JudgeS2(memory, e) ==
  If(e.event = "Stepped" /\ e.meant # e.own /\ (e.before # e.after \/ e.isLeaseMoved), memory)

\* S3 sticky-terminal. memory: <<node, room>> -> the pair that ended there.
JudgeS3(memory, e) ==
  LET ended == memory[Place(e)]
      known == Place(e) \in DOMAIN memory
      rest == Without(memory, {Place(e)})
      isNext == e.fact = "RequestOpened" /\ known /\ ended # PairOf_(e.own)
      after == IF e.after \in Over THEN With(rest, Place(e), PairOf_(e.own)) ELSE rest
  IN IF e.event # "Stepped" \/ e.before = e.after THEN Holds_(memory)
     ELSE IF e.before \in Over THEN If(IsNumbered(e.after) /\ ~isNext, after)
     ELSE IF e.after \in Over THEN Holds_(after)
     ELSE If(e.before \in Live /\ e.after \in Live /\ Rank[e.after] < Rank[e.before], memory)

\* S4 no-resurrection. memory: the <<node, pair>> that were cleared.
JudgeS4(memory, e) ==
  LET key == <<e.node, PairOf_(e.own)>>
  IN IF e.event = "NodeStopped" THEN Holds_({each \in memory : each[1] # e.node})
     ELSE IF e.event # "Stepped" \/ e.before = e.after THEN Holds_(memory)
     ELSE IF e.after \in Gone
     THEN Holds_(IF e.after = "Retired" \/ IsNumbered(e.before) THEN memory \union {key} ELSE memory)
     ELSE If(e.before \in Gone /\ key \in memory, memory)

\* S5 complete-success: what decode starts from holds what was written for it.
JudgeS5(memory, e) == If(e.event = "Committed" /\ e.holds # <<e.pair>>, memory)

(* S1 page-lifetime. memory: owners: <<node, page>> -> pair; writes: posted and not settled; ended: node -> the last
   life of it that is over. A write to a life that is over reaches nobody. *)
Touches(write, node, page) == <<node, page>> \in {<<write.node, write.source>>, <<write.to, write.page>>}

JudgeS1(memory, e) ==
  LET key == <<e.node, e.page>>
      owns == key \in DOMAIN memory.owners
      name == <<e.own, e.theirs[3]>>
      isLost == e.to \in DOMAIN memory.ended /\ e.theirs[3] <= memory.ended[e.to]
      write == [name |-> name, node |-> e.node, source |-> e.source, to |-> e.to,
                page |-> IF isLost THEN -1 ELSE e.page]
  IN CASE e.event = "Reserved" ->
            If(\E each \in memory.writes : Touches(each, e.node, e.page),
               [memory EXCEPT !.owners = With(@, key, e.pair)])
       [] e.event = "Released" -> Holds_([memory EXCEPT !.owners = Without(@, {key})])
       [] e.event = "WritePosted" ->
            Holds_([memory EXCEPT !.writes = {each \in @ : each.name # name} \union {write}])
       [] e.event = "WriteLanded" -> If(owns /\ memory.owners[key] # e.pair, memory)
       [] e.event = "WriteSettled" -> Holds_([memory EXCEPT !.writes = {each \in @ : each.name # e.write}])
       [] e.event = "NodeStopped" ->
            Holds_([owners |-> Without(memory.owners, {each \in DOMAIN memory.owners : each[1] = e.node}),
                    writes |-> {each \in memory.writes : e.node \notin {each.node, each.to}},
                    ended |-> With(memory.ended, e.node, e.epoch)])
       [] OTHER -> Holds_(memory)

\* S8 conservation. memory: owners as in S1; totals: node -> pages in all, as they were at the first release.
JudgeS8(memory, e) ==
  LET key == <<e.node, e.page>>
      left_ == Without(memory.owners, {key})
      total == e.free + Cardinality({each \in DOMAIN left_ : each[1] = e.node})
      isForeign == key \notin DOMAIN memory.owners \/ memory.owners[key] # e.pair
      isMore == e.node \in DOMAIN memory.totals /\ memory.totals[e.node] # total
  IN CASE e.event = "Reserved" -> If(key \in DOMAIN memory.owners, [memory EXCEPT !.owners = With(@, key, e.pair)])
       [] e.event = "Released" ->
            If(isForeign \/ isMore, [owners |-> left_, totals |-> With(memory.totals, e.node, total)])
       [] e.event = "NodeStopped" ->
            Holds_([owners |-> Without(memory.owners, {each \in DOMAIN memory.owners : each[1] = e.node}),
                    totals |-> Without(memory.totals, {e.node})])
       [] OTHER -> Holds_(memory)

(* S9 truthful-result. memory: running: pair -> who serves it, who has committed, node -> cause of those that failed,
   who has died since; down: who is down. *)
IsLie(request, e, down) ==
  LET serving == {request.prefill, request.decode} \ (request.died \union down)
      causes == {request.failures[node] : node \in DOMAIN request.failures}
  IN IF e.ok THEN \/ \E node \in serving : node \in DOMAIN request.failures
                  \/ request.decode \in serving /\ request.decode \notin request.committed
     ELSE causes # {} /\ e.cause \notin causes \union Roomless

JudgeS9(memory, e) ==
  LET pair == IF e.event = "Stepped" THEN PairOf_(e.own) ELSE e.pair
      request == memory.running[pair]
      isKnown == pair \in DOMAIN memory.running
      failures == IF e.node \in DOMAIN request.failures THEN request.failures
                  ELSE With(request.failures, e.node, e.cause)
      Noted(what) == Holds_([memory EXCEPT !.running = With(@, pair, what)])
  IN CASE e.event = "Admitted" ->
            Noted([prefill |-> e.prefill, decode |-> e.decode, committed |-> {}, failures |-> <<>>, died |-> {}])
       [] e.event = "Committed" /\ isKnown -> Noted([request EXCEPT !.committed = @ \union {e.node}])
       [] e.event = "Stepped" /\ e.after = "Failed" /\ e.before # "Failed" /\ isKnown ->
            Noted([request EXCEPT !.failures = failures])
       [] e.event = "Resulted" /\ isKnown ->
            If(IsLie(request, e, memory.down), [memory EXCEPT !.running = Without(@, {pair})])
       [] e.event = "NodeStopped" ->
            Holds_([running |-> [each \in DOMAIN memory.running |->
                                   [memory.running[each] EXCEPT !.died = @ \union {e.node}]],
                    down |-> memory.down \union {e.node}])
       [] e.event = "NodeStarted" -> Holds_([memory EXCEPT !.down = @ \ {e.node}])
       [] OTHER -> Holds_(memory)

\* S10 containment: no illegal fact (which stops a loop where it does).
JudgeS10(memory, e) == If(e.event = "IllegalFact", memory)

\* S11 producer-ready. memory: the <<node, pair>> whose forward pass is over.
JudgeS11(memory, e) ==
  CASE e.event = "Computed" -> Holds_(memory \union {<<e.node, e.pair>>})
    [] e.event = "WritePosted" -> If(<<e.node, PairOf_(e.theirs)>> \notin memory, memory)
    [] e.event = "NodeStopped" -> Holds_({each \in memory : each[1] # e.node})
    [] OTHER -> Holds_(memory)

\* S12 room-unique. memory: <<node, room>> -> the pair that is live there.
JudgeS12(memory, e) ==
  LET wasLive == e.before \in Live
      isLive == Place(e) \in DOMAIN memory
      own == PairOf_(e.own)
      meant == PairOf_(e.meant)
      isTaken == own # meant /\ wasLive
      isStill == e.before = e.after /\ ~e.isLeaseMoved
      present == IF isTaken THEN <<own>> ELSE IF isLive THEN <<memory[Place(e)]>> ELSE <<>>
      opened == IF isTaken THEN meant ELSE own
  IN IF e.event = "NodeStopped" THEN Holds_(Without(memory, {each \in DOMAIN memory : each[1] = e.node}))
     ELSE IF e.event # "Stepped" THEN Holds_(memory)
     ELSE IF e.after \notin Live THEN Holds_(IF wasLive THEN Without(memory, {Place(e)}) ELSE memory)
     ELSE IF e.fact = "RequestOpened"
     THEN IF isTaken /\ isStill THEN Holds_(memory)
          ELSE If(present \notin {<<>>, <<opened>>}, With(memory, Place(e), opened))
     ELSE IF ~wasLive THEN Holds_(With(memory, Place(e), own))
     ELSE If(e.fact = "RivalOpened" /\ ~e.isRejected /\ meant # own, memory)

(* L1 bounded-end. memory: pair -> [pending: node -> has it opened the room?, resulted, died]; down. What is owed is
   a <<pair, node>>: it must not be so for ever. *)
Ends(e) == IF e.after = "Absent" THEN IsNumbered(e.before) ELSE e.after \notin Live \union {"Announced"}

JudgeL1(memory, e) ==
  LET pair == IF e.event = "Stepped" THEN PairOf_(e.own) ELSE e.pair
      ending == memory.endings[pair]
      isKnown == pair \in DOMAIN memory.endings
      isPending == isKnown /\ e.node \in DOMAIN ending.pending
      Noted(what) == Holds_([memory EXCEPT !.endings = With(@, pair, what)])
  IN CASE e.event = "Admitted" ->
            Noted([pending |-> e.prefill :> FALSE @@ e.decode :> FALSE, resulted |-> FALSE, died |-> {}])
       [] e.event = "Resulted" /\ isKnown -> Noted([ending EXCEPT !.resulted = TRUE])
       [] e.event = "Stepped" /\ e.before # e.after /\ ~(e.before \in Live /\ e.after \in Live) /\ isPending ->
            IF e.after \in Live THEN Noted([ending EXCEPT !.pending[e.node] = TRUE])
            ELSE IF ~Ends(e) THEN Holds_(memory)
            ELSE IF DOMAIN ending.pending = {e.node} THEN Holds_([memory EXCEPT !.endings = Without(@, {pair})])
            ELSE Noted([ending EXCEPT !.pending = Without(@, {e.node})])
       [] e.event = "NodeStopped" ->
            Holds_([endings |-> [each \in DOMAIN memory.endings |->
                                   [memory.endings[each] EXCEPT !.died = @ \union {e.node}]],
                    down |-> memory.down \union {e.node}])
       [] e.event = "NodeStarted" -> Holds_([memory EXCEPT !.down = @ \ {e.node}])
       [] OTHER -> Holds_(memory)

OwedL1(memory, pair, node) ==
  LET ending == memory.endings[pair]
  IN /\ pair \in DOMAIN memory.endings
     /\ node \in DOMAIN ending.pending
     /\ ~(ending.resulted /\ ~ending.pending[node])
     /\ node \notin ending.died \union memory.down

(* L2 propagate. memory: holders: {<<pair, node, role>>} with a live poll; failed: the same of those that failed;
   owed: {<<pair, node>>} that still hold what the other side has failed. *)
JudgeL2(memory, e) ==
  LET pair == PairOf_(e.own)
      me == <<pair, e.node, e.role>>
      Of(set, role) == {each \in set : each[1] = pair /\ each[3] = role}
      other == IF e.role = "sender" THEN "receiver" ELSE "sender"
      isHeard == Of(memory.failed, other) # {}
      isFirst == Of(memory.failed, e.role) = {}
      told == IF e.after = "Failed" /\ isFirst THEN {<<pair, each[2]>> : each \in Of(memory.holders, other)} ELSE {}
      stays == {each \in memory.failed : each[2] # e.node}
      \* sides that nobody who lives has failed any more
      untold == {each \in memory.failed : ~\E one \in stays : one[1] = each[1] /\ one[3] = each[3]}
      forgiven == {each \in memory.holders : \E one \in untold : one[1] = each[1] /\ one[3] # each[3]}
  IN IF e.event = "NodeStopped"
     THEN Holds_([holders |-> {each \in memory.holders : each[2] # e.node}, failed |-> stays,
                  owed |-> {each \in memory.owed : each[2] # e.node} \ {<<each[1], each[2]>> : each \in forgiven}])
     ELSE IF e.event # "Stepped" \/ e.before = e.after THEN Holds_(memory)
     ELSE IF e.after \in Live
     THEN IF e.before \in Live THEN Holds_(memory)
          ELSE Holds_([memory EXCEPT !.holders = @ \union {me},
                                     !.owed = IF isHeard THEN @ \union {<<pair, e.node>>} ELSE @])
     ELSE Holds_([holders |-> IF e.before \in Live THEN memory.holders \ {me} ELSE memory.holders,
                  failed |-> IF e.after = "Failed" THEN memory.failed \union {me} ELSE memory.failed,
                  owed |-> (memory.owed \union told) \ IF e.before \in Live THEN {<<pair, e.node>>} ELSE {}])

\* ------------------------------------------------------------------------------------------ all together

NoMemory == <<>>
Begin(id) ==
  CASE id \in {"S4", "S11"} -> {}
    [] id = "S1" -> [owners |-> <<>>, writes |-> {}, ended |-> <<>>]
    [] id = "S8" -> [owners |-> <<>>, totals |-> <<>>]
    [] id = "S9" -> [running |-> <<>>, down |-> {}]
    [] id = "L1" -> [endings |-> <<>>, down |-> {}]
    [] id = "L2" -> [holders |-> {}, failed |-> {}, owed |-> {}]
    [] OTHER -> NoMemory

Judge(id, memory, event) ==
  CASE id = "S1" -> JudgeS1(memory, event)
    [] id = "S2" -> JudgeS2(memory, event)
    [] id = "S3" -> JudgeS3(memory, event)
    [] id = "S4" -> JudgeS4(memory, event)
    [] id = "S5" -> JudgeS5(memory, event)
    [] id = "S8" -> JudgeS8(memory, event)
    [] id = "S9" -> JudgeS9(memory, event)
    [] id = "S10" -> JudgeS10(memory, event)
    [] id = "S11" -> JudgeS11(memory, event)
    [] id = "S12" -> JudgeS12(memory, event)
    [] id = "L1" -> JudgeL1(memory, event)
    [] id = "L2" -> JudgeL2(memory, event)

RECURSIVE Judged(_, _, _)
Judged(id, known, told) ==
  LET made == Judge(id, known.memory, Head(told))
  IN IF told = <<>> \/ known.broken THEN known
     ELSE Judged(id, IF made.broken THEN If(TRUE, NoMemory) ELSE made, Tail(told))

Monitored == Watched \intersect {"S1", "S2", "S3", "S4", "S5", "S8", "S9", "S10", "S11", "S12", "L1", "L2"}
UnwitnessedYet == seen = [id \in Monitored |-> Holds_(Begin(id))]
Witnessing(told) ==
  seen' = IF told = <<>> \/ Monitored = {} THEN seen ELSE [id \in Monitored |-> Judged(id, seen[id], told)]

IsUpheld(id) == id \in Watched => ~seen[id].broken
S1 == IsUpheld("S1")
S2 == IsUpheld("S2")
S3 == IsUpheld("S3")
S4 == IsUpheld("S4")
S5 == IsUpheld("S5")
S8 == IsUpheld("S8")
S9 == IsUpheld("S9")
S10 == IsUpheld("S10")
S11 == IsUpheld("S11")
S12 == IsUpheld("S12")
================================================================================
