-------------------------------- MODULE Tables --------------------------------
(* GENERATED from spec/kvpoll.toml by `python -m kvpoll.spec.tables_tla`; edit that file
   and run it again. A test says when this file is stale.

   Nothing here decides anything: Machine.tla says how rows are tried and taken.

   row      from    states in which it applies        fact     what happened
            guards  all must hold                     to       next state ("=" stays)
            update  bookkeeping, in order             actions  <<name, argument>>, argument "None" if there is none
            when    <<rule, values>>: all rules must have one of the values, or the row does not exist
            cause   first failure cause to remember ("None": no; "detail": taken from the fact)
   joint    polls, leases: the pair of states that triggers it; to_poll, to_lease: where it leads
   ignored, illegal   <<fact, states>>: what is said of a cell in which no row is taken
   stale    <<fact, actions>>: what a fact meant for an incarnation that is over is answered

   The comment behind a row is its source in kvpoll.toml, with the invariants that it breaks, if any. *)
EXTENDS Integers, Sequences, TLC

\* ---- profiles: the value of every rule that a step may ask for

\* reference: every invariant holds under the whole fault vocabulary
Rules_reference ==
  [identity |-> "incarnation", clear_leaves |-> "tombstone", early_destination |-> "held",
    early_abort |-> "remembered", duplicate_room |-> "rejected", success_is_final |-> "yes",
    page_count |-> "agreed", failed_writes |-> "stopped", setup_failure |-> "final",
    illegal_fact |-> "fails_request", prefill_failure_notice |-> "always",
    decode_failure_notice |-> "looks_on", release_requires_quiescence |-> "proof", source_release |-> "proof",
    decode_bootstrap_deadline |-> "armed", prefill_transfer_deadline |-> "armed",
    pp_decision |-> "rank0_by_request_id", agreement |-> "by_request_id", decode_enqueue |-> "at_arrival",
    dp_conflict |-> "fails_at_once", dp_rank_notion |-> "effective", dp_lookup |-> "derive",
    ready_means |-> "distinct_ranks", register_exhausted |-> "unhealthy_keep_trying",
    registration_watch |-> "epoch", liveness_probe |-> "rank_epoch", route_cache |-> "by_epoch",
    topology_patience |-> "own", endpoint_patience |-> "as_topology", resend_on_reconnect |-> "yes",
    router_join |-> "first_failure_cancels", http_calls |-> "asynchronous", health |-> "can_serve",
    deadline_clock |-> "monotonic", register_attempts |-> 5, topology_attempts |-> 40,
    heartbeat_max_failure |-> 2]

\* sglang-0.5.23: the protocol as SGLang ships it today
Rules_sglang_0_5_23 ==
  [Rules_reference EXCEPT !.identity = "room", !.clear_leaves = "nothing", !.early_destination = "opens_room",
    !.early_abort = "forgotten", !.duplicate_room = "shared", !.success_is_final = "no",
    !.page_count = "unchecked", !.failed_writes = "left", !.illegal_fact = "stops_scheduler",
    !.prefill_failure_notice = "transfer_errors_only", !.decode_failure_notice = "known_ranks",
    !.release_requires_quiescence = "proof_or_timeout", !.source_release = "at_once",
    !.decode_bootstrap_deadline = "none", !.prefill_transfer_deadline = "none",
    !.pp_decision = "rank0_by_position", !.agreement = "by_position", !.dp_rank_notion = "attention",
    !.ready_means = "count_of_puts", !.register_exhausted = "continue_unregistered",
    !.registration_watch = "none", !.liveness_probe = "server_health", !.route_cache = "by_address",
    !.topology_patience = "shared", !.endpoint_patience = "none", !.resend_on_reconnect = "no",
    !.router_join = "waits_for_both", !.http_calls = "blocking", !.health = "process_alive",
    !.deadline_clock = "wall", !.topology_attempts = 15]

\* before-sglang-24772: failed set-up is overwritten by WaitingForInput
Rules_before_sglang_24772 ==
  [Rules_sglang_0_5_23 EXCEPT !.setup_failure = "overwritten", !.http_calls = "asynchronous"]

\* after-sglang-24772: a failed set-up returns before WaitingForInput
Rules_after_sglang_24772 ==
  [Rules_before_sglang_24772 EXCEPT !.setup_failure = "final"]

\* before-sglang-27028: later pipeline stages keep failed requests for ever (issue 26912)
Rules_before_sglang_27028 ==
  [Rules_sglang_0_5_23 EXCEPT !.pp_decision = "consensus_good_only", !.http_calls = "asynchronous"]

\* after-sglang-27028: every stage drops what has failed locally
Rules_after_sglang_27028 ==
  [Rules_before_sglang_27028 EXCEPT !.pp_decision = "consensus_or_local_failed"]

\* before-sglang-22901: decode derives the prefill DP rank from the room, whatever the router chose
Rules_before_sglang_22901 ==
  [Rules_sglang_0_5_23 EXCEPT !.dp_conflict = "unchecked", !.dp_rank_notion = "effective",
    !.router_join = "first_failure_cancels", !.http_calls = "asynchronous"]

\* after-sglang-22901: a rank that decode will not find refuses the request, naming both ranks and the switch
Rules_after_sglang_22901 ==
  [Rules_before_sglang_22901 EXCEPT !.dp_conflict = "fails_at_once"]

\* before-sglang-25125: one attempt to register, before the bootstrap server listens
Rules_before_sglang_25125 ==
  [Rules_sglang_0_5_23 EXCEPT !.http_calls = "asynchronous", !.register_attempts = 1]

\* after-sglang-25125: five attempts with exponential back-off and jitter
Rules_after_sglang_25125 ==
  [Rules_before_sglang_25125 EXCEPT !.register_attempts = 5]

\* before-sglang-21299: decode ranks queue a request when each has resolved it, so their queues diverge
Rules_before_sglang_21299 ==
  [Rules_sglang_0_5_23 EXCEPT !.decode_enqueue = "after_resolution", !.http_calls = "asynchronous"]

\* after-sglang-21299: receiver created and queued at once, its set-up deferred
Rules_after_sglang_21299 ==
  [Rules_before_sglang_21299 EXCEPT !.decode_enqueue = "at_arrival"]

Profiles ==
     "reference" :> Rules_reference
  @@ "sglang-0.5.23" :> Rules_sglang_0_5_23
  @@ "before-sglang-24772" :> Rules_before_sglang_24772
  @@ "after-sglang-24772" :> Rules_after_sglang_24772
  @@ "before-sglang-27028" :> Rules_before_sglang_27028
  @@ "after-sglang-27028" :> Rules_after_sglang_27028
  @@ "before-sglang-22901" :> Rules_before_sglang_22901
  @@ "after-sglang-22901" :> Rules_after_sglang_22901
  @@ "before-sglang-25125" :> Rules_before_sglang_25125
  @@ "after-sglang-25125" :> Rules_after_sglang_25125
  @@ "before-sglang-21299" :> Rules_before_sglang_21299
  @@ "after-sglang-21299" :> Rules_after_sglang_21299

\* ---- sender: prefill sender: one per incarnation and prefill rank

Role_sender == [
  states |-> {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed", "Retired"},
  initial |-> "Absent",
  terminal |-> {"Success", "Failed"},
  facts |-> {"RequestOpened", "RivalOpened", "DestinationRegistered", "PagesReserved", "WritePosted", "WriteCompleted", "WriteFailed", "WriteSettled", "AbortRequested", "PeerAborted", "PeerSuspected", "PeerDied", "DpConflictFound", "DeadlineReached", "LinkRestored", "Cleared"},
  rows |-> <<
    [from |-> {"Absent"}, fact |-> "RequestOpened", to |-> "WaitingForInput", guards |-> <<"needs_no_destination">>, update |-> <<"own", "expect">>, actions |-> <<<<"ArmDeadline", "transfer">>>>, when |-> <<<<"prefill_transfer_deadline", {"armed"}>>>>, cause |-> "None"], \* P1'
    [from |-> {"Absent"}, fact |-> "RequestOpened", to |-> "WaitingForInput", guards |-> <<"needs_no_destination">>, update |-> <<"own", "expect">>, actions |-> <<>>, when |-> <<<<"prefill_transfer_deadline", {"none"}>>>>, cause |-> "None"], \* P1'
    [from |-> {"Absent"}, fact |-> "RequestOpened", to |-> "Bootstrapping", guards |-> <<>>, update |-> <<"own", "expect">>, actions |-> <<<<"ArmDeadline", "bootstrap">>>>, when |-> <<>>, cause |-> "None"], \* P1
    [from |-> {"Announced"}, fact |-> "RequestOpened", to |-> "Failed", guards |-> <<"abort_was_early">>, update |-> <<"own", "expect">>, actions |-> <<<<"CancelDeadline", "announced">>>>, when |-> <<>>, cause |-> "aborted_by_decode"], \* C6; the lease acknowledges
    [from |-> {"Announced"}, fact |-> "RequestOpened", to |-> "WaitingForInput", guards |-> <<"destinations_were_complete">>, update |-> <<"own", "expect">>, actions |-> <<<<"CancelDeadline", "announced">>, <<"ArmDeadline", "transfer">>>>, when |-> <<<<"prefill_transfer_deadline", {"armed"}>>>>, cause |-> "None"], \* P1''
    [from |-> {"Announced"}, fact |-> "RequestOpened", to |-> "WaitingForInput", guards |-> <<"destinations_were_complete">>, update |-> <<"own", "expect">>, actions |-> <<<<"CancelDeadline", "announced">>>>, when |-> <<<<"prefill_transfer_deadline", {"none"}>>>>, cause |-> "None"], \* P1''
    [from |-> {"Announced"}, fact |-> "RequestOpened", to |-> "Bootstrapping", guards |-> <<>>, update |-> <<"own", "expect">>, actions |-> <<<<"CancelDeadline", "announced">>, <<"ArmDeadline", "bootstrap">>>>, when |-> <<>>, cause |-> "None"], \* P1
    [from |-> {"WaitingForInput", "Failed"}, fact |-> "RequestOpened", to |-> "=", guards |-> <<"has_no_owner">>, update |-> <<"own">>, actions |-> <<>>, when |-> <<<<"early_destination", {"opens_room"}>>>>, cause |-> "None"], \* P1'': the merge rule absorbs the late Bootstrapping
    [from |-> {"Retired"}, fact |-> "RequestOpened", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"RejectRequest", "None">>>>, when |-> <<>>, cause |-> "None"], \* the incarnation is already over
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed"}, fact |-> "RivalOpened", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"RejectRequest", "None">>>>, when |-> <<<<"duplicate_room", {"rejected"}>>>>, cause |-> "None"], \* A22
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed"}, fact |-> "RivalOpened", to |-> "=", guards |-> <<>>, update |-> <<"adopt">>, actions |-> <<>>, when |-> <<<<"duplicate_room", {"shared"}>>>>, cause |-> "None"], \* A22: max() keeps the old state; breaks S12, S2
    [from |-> {"Absent"}, fact |-> "DestinationRegistered", to |-> "WaitingForInput", guards |-> <<"arrival_completes">>, update |-> <<"note_arrival">>, actions |-> <<>>, when |-> <<<<"early_destination", {"opens_room"}>>>>, cause |-> "None"], \* P1'', A11; breaks S4
    [from |-> {"Absent"}, fact |-> "DestinationRegistered", to |-> "Announced", guards |-> <<>>, update |-> <<"note_arrival">>, actions |-> <<>>, when |-> <<<<"early_destination", {"opens_room"}>>>>, cause |-> "None"], \* transfer_infos without a room
    [from |-> {"Absent"}, fact |-> "DestinationRegistered", to |-> "Announced", guards |-> <<>>, update |-> <<"note_arrival">>, actions |-> <<<<"ArmDeadline", "announced">>>>, when |-> <<<<"early_destination", {"held"}>>>>, cause |-> "None"], \* A11
    [from |-> {"Announced"}, fact |-> "DestinationRegistered", to |-> "WaitingForInput", guards |-> <<"arrival_completes">>, update |-> <<"note_arrival">>, actions |-> <<>>, when |-> <<<<"early_destination", {"opens_room"}>>>>, cause |-> "None"], \* P1''; breaks S4
    [from |-> {"Announced"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<>>, update |-> <<"note_arrival">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Bootstrapping"}, fact |-> "DestinationRegistered", to |-> "WaitingForInput", guards |-> <<"arrival_completes">>, update |-> <<"note_arrival">>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"ArmDeadline", "transfer">>>>, when |-> <<<<"prefill_transfer_deadline", {"armed"}>>>>, cause |-> "None"], \* P3
    [from |-> {"Bootstrapping"}, fact |-> "DestinationRegistered", to |-> "WaitingForInput", guards |-> <<"arrival_completes">>, update |-> <<"note_arrival">>, actions |-> <<<<"CancelDeadline", "bootstrap">>>>, when |-> <<<<"prefill_transfer_deadline", {"none"}>>>>, cause |-> "None"], \* P3
    [from |-> {"Bootstrapping"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<>>, update |-> <<"note_arrival">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* P3
    [from |-> {"Success"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerDecode", "Success">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Failed"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<>>, update |-> <<"note_arrival">>, actions |-> <<<<"AnswerDecode", "Failed">>>>, when |-> <<<<"prefill_failure_notice", {"always"}>>>>, cause |-> "None"], \* A18: late joiner
    [from |-> {"Retired"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<"remembers_success">>, update |-> <<>>, actions |-> <<<<"AnswerDecode", "Success">>>>, when |-> <<>>, cause |-> "None"], \* A11
    [from |-> {"Retired"}, fact |-> "DestinationRegistered", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerDecode", "Failed">>>>, when |-> <<>>, cause |-> "None"], \* A11
    [from |-> {"WaitingForInput", "Transferring"}, fact |-> "WritePosted", to |-> "Transferring", guards |-> <<>>, update |-> <<"count_write">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* P7
    [from |-> {"Transferring"}, fact |-> "WriteCompleted", to |-> "Success", guards |-> <<"was_last_write">>, update |-> <<"uncount_write">>, actions |-> <<<<"CancelDeadline", "transfer">>, <<"NotifyDecode", "Success">>>>, when |-> <<>>, cause |-> "None"], \* P8
    [from |-> {"Transferring"}, fact |-> "WriteCompleted", to |-> "=", guards |-> <<>>, update |-> <<"uncount_write">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* P8
    [from |-> {"Failed"}, fact |-> "WriteCompleted", to |-> "=", guards |-> <<>>, update |-> <<"uncount_write">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* B32
    [from |-> {"Transferring"}, fact |-> "WriteFailed", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "transfer">>, <<"NotifyDecode", "Failed">>>>, when |-> <<>>, cause |-> "transfer_error"], \* P9
    [from |-> {"Failed"}, fact |-> "WriteSettled", to |-> "=", guards |-> <<>>, update |-> <<"uncount_write">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* ENGINES 4: failed is not drained
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring"}, fact |-> "AbortRequested", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "transfer">>, <<"NotifyDecode", "Failed">>>>, when |-> <<<<"prefill_failure_notice", {"always"}>>>>, cause |-> "detail"], \* P6, A02
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring"}, fact |-> "AbortRequested", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "transfer">>>>, when |-> <<<<"prefill_failure_notice", {"transfer_errors_only"}>>>>, cause |-> "detail"], \* P6, A02
    [from |-> {"Success"}, fact |-> "AbortRequested", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"success_is_final", {"no"}>>>>, cause |-> "detail"], \* PROTOCOL 3.1; breaks S3
    [from |-> {"Absent"}, fact |-> "PeerAborted", to |-> "Announced", guards |-> <<>>, update |-> <<"note_abort">>, actions |-> <<<<"ArmDeadline", "announced">>, <<"AcknowledgeAbort", "None">>>>, when |-> <<<<"early_abort", {"remembered"}>>>>, cause |-> "None"], \* C6
    [from |-> {"Absent"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<<<"early_abort", {"forgotten"}>>>>, cause |-> "None"], \* C6
    [from |-> {"Announced"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<>>, update |-> <<"note_abort">>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<<<"early_abort", {"remembered"}>>>>, cause |-> "None"], \* C6
    [from |-> {"Announced"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<<<"early_abort", {"forgotten"}>>>>, cause |-> "None"], \* C6
    [from |-> {"Success", "Retired"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<>>, update |-> <<"note_abort">>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<>>, cause |-> "None"], \* nothing is outstanding
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring"}, fact |-> "PeerAborted", to |-> "Failed", guards |-> <<>>, update |-> <<"note_abort">>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "transfer">>>>, when |-> <<>>, cause |-> "aborted_by_decode"], \* P5; the lease acknowledges when it is quiet
    [from |-> {"Failed"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<"no_write_outstanding">>, update |-> <<"note_abort">>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<>>, cause |-> "None"], \* B32
    [from |-> {"Failed"}, fact |-> "PeerAborted", to |-> "=", guards |-> <<>>, update |-> <<"note_abort">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* B32
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring"}, fact |-> "PeerSuspected", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "transfer">>, <<"NotifyDecode", "Failed">>>>, when |-> <<<<"liveness_probe", {"rank_epoch"}>>>>, cause |-> "decode_lost"], \* A20
    [from |-> {"Bootstrapping", "WaitingForInput", "Transferring"}, fact |-> "PeerDied", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "transfer">>>>, when |-> <<>>, cause |-> "decode_lost"], \* A20
    [from |-> {"Bootstrapping"}, fact |-> "DpConflictFound", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"NotifyDecode", "Failed">>>>, when |-> <<<<"prefill_failure_notice", {"always"}>>>>, cause |-> "detail"], \* P2, sglang#22901
    [from |-> {"Bootstrapping"}, fact |-> "DpConflictFound", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>>>, when |-> <<<<"prefill_failure_notice", {"transfer_errors_only"}>>>>, cause |-> "detail"], \* P2, sglang#22901
    [from |-> {"Bootstrapping"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_bootstrap">>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Failed">>>>, when |-> <<<<"prefill_failure_notice", {"always"}>>>>, cause |-> "bootstrap_timeout"], \* P4
    [from |-> {"Bootstrapping"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_bootstrap">>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"prefill_failure_notice", {"transfer_errors_only"}>>>>, cause |-> "bootstrap_timeout"], \* P4
    [from |-> {"WaitingForInput", "Transferring"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_transfer">>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Failed">>>>, when |-> <<<<"prefill_transfer_deadline", {"armed"}>>>>, cause |-> "transfer_timeout"], \* PROTOCOL 17.5
    [from |-> {"Announced"}, fact |-> "DeadlineReached", to |-> "Retired", guards |-> <<"timer_is_announced">>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Failed">>, <<"ArmDeadline", "tombstone">>>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "never_opened"], \* B49
    [from |-> {"Announced"}, fact |-> "DeadlineReached", to |-> "Absent", guards |-> <<"timer_is_announced">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"], \* B49
    [from |-> {"Retired"}, fact |-> "DeadlineReached", to |-> "Absent", guards |-> <<"timer_is_tombstone">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* A11
    [from |-> {"Success"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Success">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Failed"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Failed">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Retired"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<"remembers_success">>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Success">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Retired"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"NotifyDecode", "Failed">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "Retired", guards |-> <<"memory_is_back">>, update |-> <<>>, actions |-> <<<<"ArmDeadline", "tombstone">>>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"], \* P10, A11
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "=", guards |-> <<>>, update |-> <<"mark_cleared">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"], \* the lease retires the room when it is quiet
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "Absent", guards |-> <<"memory_is_back">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"], \* P10
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "Absent", guards |-> <<>>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>, <<"source_release", {"at_once"}>>>>, cause |-> "None"], \* P10, B32 (1): cleared under a running write
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "=", guards |-> <<>>, update |-> <<"mark_cleared">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>, <<"source_release", {"proof"}>>>>, cause |-> "None"] \* the lease forgets the room when it is quiet
  >>,
  ignored |-> <<
    <<"RivalOpened", {"Absent", "Announced", "Retired"}>>,
    <<"PagesReserved", {"Bootstrapping", "WaitingForInput", "Transferring"}>>,
    <<"DestinationRegistered", {"WaitingForInput", "Transferring", "Success", "Failed"}>>,
    <<"WriteCompleted", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Success", "Retired"}>>,
    <<"WriteFailed", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"WriteSettled", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Success", "Retired"}>>,
    <<"AbortRequested", {"Absent", "Announced", "Success", "Failed", "Retired"}>>,
    <<"PeerSuspected", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed", "Retired"}>>,
    <<"PeerDied", {"Absent", "Announced", "Success", "Failed", "Retired"}>>,
    <<"DpConflictFound", {"WaitingForInput", "Failed"}>>,
    <<"DeadlineReached", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed", "Retired"}>>,
    <<"LinkRestored", {"Absent", "Announced", "Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed", "Retired"}>>,
    <<"Cleared", {"Absent", "Announced", "Retired"}>>
  >>,
  illegal |-> <<
    <<"RequestOpened", {"Bootstrapping", "WaitingForInput", "Transferring", "Success", "Failed"}>>,
    <<"PagesReserved", {"Absent", "Announced", "Success", "Failed", "Retired"}>>,
    <<"WritePosted", {"Absent", "Announced", "Bootstrapping", "Success", "Failed", "Retired"}>>,
    <<"WriteSettled", {"Transferring"}>>,
    <<"DpConflictFound", {"Absent", "Announced", "Transferring", "Success", "Retired"}>>,
    <<"Cleared", {"Bootstrapping", "WaitingForInput", "Transferring"}>>
  >>,
  lease |-> [
    states |-> {"Unreserved", "Reserved", "Exposed", "Draining", "Forsaken", "Released"},
    initial |-> "Unreserved",
    terminal |-> {},
    facts |-> {"PagesReserved", "WritePosted"},
    rows |-> <<
      [from |-> {"Unreserved"}, fact |-> "PagesReserved", to |-> "Reserved", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
      [from |-> {"Reserved", "Exposed"}, fact |-> "WritePosted", to |-> "Exposed", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
    >>,
    ignored |-> <<
      <<"PagesReserved", {"Reserved", "Exposed"}>>
    >>,
    illegal |-> <<
      <<"PagesReserved", {"Draining", "Forsaken", "Released"}>>,
      <<"WritePosted", {"Unreserved", "Draining", "Forsaken", "Released"}>>
    >>],
  joint |-> <<
    [polls |-> {"Success"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Reserved"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"abort_is_owed">>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>, <<"AcknowledgeAbort", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Reserved"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Exposed", "Draining"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"no_write_outstanding", "abort_is_owed">>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>, <<"AcknowledgeAbort", "None">>>>, when |-> <<>>, cause |-> "None"], \* B32: ack implies quiescence
    [polls |-> {"Failed"}, leases |-> {"Exposed", "Draining"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"no_write_outstanding">>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* B32
    [polls |-> {"Failed"}, leases |-> {"Forsaken"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"no_write_outstanding", "abort_is_owed">>, update |-> <<>>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<<<"source_release", {"at_once"}>>>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Forsaken"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"no_write_outstanding">>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"source_release", {"at_once"}>>>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Draining", to |-> "Draining", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"source_release", {"proof"}>>>>, cause |-> "None"], \* B32 (5)
    [polls |-> {"Failed"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Forsaken", to |-> "Forsaken", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<<<"source_release", {"at_once"}>>>>, cause |-> "None"], \* B32 (5): the pages go, the writes stay; breaks S1
    [polls |-> {"Failed"}, leases |-> {"Unreserved"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"abort_is_owed">>, update |-> <<>>, actions |-> <<<<"AcknowledgeAbort", "None">>>>, when |-> <<>>, cause |-> "None"], \* nothing was ever written
    [polls |-> {"Failed"}, leases |-> {"Unreserved"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [polls |-> {"Success", "Failed"}, leases |-> {"Released"}, to_poll |-> "Retired", to_lease |-> "=", to |-> "=", guards |-> <<"was_cleared">>, update |-> <<>>, actions |-> <<<<"ArmDeadline", "tombstone">>>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"],
    [polls |-> {"Success", "Failed"}, leases |-> {"Released"}, to_poll |-> "Absent", to_lease |-> "=", to |-> "=", guards |-> <<"was_cleared">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"]
  >>,
  stale |-> <<
    <<"RequestOpened", <<<<"RejectRequest", "None">>>>>>,
    <<"PeerAborted", <<<<"AcknowledgeAbort", "None">>>>>>,
    <<"DestinationRegistered", <<<<"AnswerDecode", "Failed">>>>>>
  >>]

\* ---- receiver: decode receiver: one per incarnation and decode rank

Role_receiver == [
  states |-> {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"},
  initial |-> "Absent",
  terminal |-> {"Success", "Failed"},
  facts |-> {"RequestOpened", "RivalOpened", "RoutesResolved", "RouteUnavailable", "SetupFinished", "PagesReserved", "MetadataSent", "StatusReceived", "AbortRequested", "AbortAcknowledged", "PeerSuspected", "PeerDied", "WritesRefused", "DeadlineReached", "LinkRestored", "Cleared"},
  rows |-> <<
    [from |-> {"Absent"}, fact |-> "RequestOpened", to |-> "Bootstrapping", guards |-> <<>>, update |-> <<"own">>, actions |-> <<<<"ArmDeadline", "bootstrap">>>>, when |-> <<<<"decode_bootstrap_deadline", {"armed"}>>>>, cause |-> "None"], \* D1
    [from |-> {"Absent"}, fact |-> "RequestOpened", to |-> "Bootstrapping", guards |-> <<>>, update |-> <<"own">>, actions |-> <<>>, when |-> <<<<"decode_bootstrap_deadline", {"none"}>>>>, cause |-> "None"], \* D1, B40
    [from |-> {"Retired"}, fact |-> "RequestOpened", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"RejectRequest", "None">>>>, when |-> <<>>, cause |-> "None"], \* the incarnation is already over
    [from |-> {"Bootstrapping", "WaitingForInput", "Success", "Failed"}, fact |-> "RivalOpened", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"RejectRequest", "None">>>>, when |-> <<<<"duplicate_room", {"rejected"}>>>>, cause |-> "None"], \* A22
    [from |-> {"Bootstrapping", "WaitingForInput", "Success", "Failed"}, fact |-> "RivalOpened", to |-> "=", guards |-> <<>>, update |-> <<"adopt">>, actions |-> <<>>, when |-> <<<<"duplicate_room", {"shared"}>>>>, cause |-> "None"], \* A22; breaks S12, S2
    [from |-> {"Bootstrapping"}, fact |-> "RoutesResolved", to |-> "=", guards |-> <<>>, update |-> <<"note_routes">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* D2
    [from |-> {"Failed"}, fact |-> "RoutesResolved", to |-> "=", guards |-> <<"has_no_routes">>, update |-> <<"note_routes">>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"decode_failure_notice", {"looks_on"}>>>>, cause |-> "None"], \* L2: found too late, and told at once
    [from |-> {"Retired"}, fact |-> "RoutesResolved", to |-> "=", guards |-> <<"has_no_routes", "remembers_failure">>, update |-> <<"note_routes">>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"decode_failure_notice", {"looks_on"}>>>>, cause |-> "None"], \* L2
    [from |-> {"Bootstrapping"}, fact |-> "RouteUnavailable", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>>>, when |-> <<>>, cause |-> "detail"], \* D3
    [from |-> {"Bootstrapping"}, fact |-> "SetupFinished", to |-> "WaitingForInput", guards |-> <<"has_routes">>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"ArmDeadline", "admission">>>>, when |-> <<<<"decode_bootstrap_deadline", {"armed"}>>>>, cause |-> "None"], \* D2
    [from |-> {"Bootstrapping"}, fact |-> "SetupFinished", to |-> "WaitingForInput", guards |-> <<"has_routes">>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"decode_bootstrap_deadline", {"none"}>>>>, cause |-> "None"], \* D2
    [from |-> {"Failed"}, fact |-> "SetupFinished", to |-> "WaitingForInput", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"setup_failure", {"overwritten"}>>>>, cause |-> "None"], \* sglang#24772; breaks S3
    [from |-> {"WaitingForInput"}, fact |-> "MetadataSent", to |-> "=", guards |-> <<"has_routes">>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "admission">>, <<"ArmDeadline", "waiting">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 5.2
    [from |-> {"WaitingForInput"}, fact |-> "StatusReceived", to |-> "Failed", guards |-> <<"outcome_is_failed">>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "waiting">>, <<"CancelDeadline", "admission">>, <<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "failed_by_prefill"], \* D7
    [from |-> {"WaitingForInput"}, fact |-> "StatusReceived", to |-> "Success", guards |-> <<"response_completes", "memory_is_exposed">>, update |-> <<"note_response">>, actions |-> <<<<"CancelDeadline", "waiting">>>>, when |-> <<>>, cause |-> "None"], \* D6
    [from |-> {"WaitingForInput"}, fact |-> "StatusReceived", to |-> "Success", guards |-> <<"response_completes">>, update |-> <<"note_response">>, actions |-> <<>>, when |-> <<<<"identity", {"room"}>>>>, cause |-> "None"], \* D6: success before publication is believed; breaks S5
    [from |-> {"WaitingForInput"}, fact |-> "StatusReceived", to |-> "=", guards |-> <<"outcome_is_success">>, update |-> <<"note_response">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* D6
    [from |-> {"Bootstrapping"}, fact |-> "StatusReceived", to |-> "Failed", guards |-> <<"outcome_is_failed">>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "failed_by_prefill"], \* D7
    [from |-> {"Bootstrapping", "WaitingForInput"}, fact |-> "AbortRequested", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "admission">>, <<"CancelDeadline", "waiting">>, <<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "detail"], \* D9
    [from |-> {"Success"}, fact |-> "AbortRequested", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"success_is_final", {"no"}>>>>, cause |-> "detail"], \* D9; breaks S3
    [from |-> {"Failed"}, fact |-> "AbortAcknowledged", to |-> "=", guards |-> <<>>, update |-> <<"note_drain">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 12
    [from |-> {"Bootstrapping", "WaitingForInput"}, fact |-> "PeerSuspected", to |-> "Failed", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "admission">>, <<"CancelDeadline", "waiting">>, <<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "prefill_lost"], \* D8
    [from |-> {"Bootstrapping", "WaitingForInput"}, fact |-> "PeerDied", to |-> "Failed", guards |-> <<"a_sibling_lives">>, update |-> <<"note_death">>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "admission">>, <<"CancelDeadline", "waiting">>, <<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "prefill_lost"], \* D8, L2: the other prefill ranks of the room hear of it now
    [from |-> {"Bootstrapping", "WaitingForInput"}, fact |-> "PeerDied", to |-> "Failed", guards |-> <<>>, update |-> <<"note_death">>, actions |-> <<<<"CancelDeadline", "bootstrap">>, <<"CancelDeadline", "admission">>, <<"CancelDeadline", "waiting">>>>, when |-> <<>>, cause |-> "prefill_lost"], \* D8, ENGINES 4
    [from |-> {"Failed"}, fact |-> "PeerDied", to |-> "=", guards |-> <<>>, update |-> <<"note_death">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* ENGINES 4: a dead writer has drained
    [from |-> {"Failed"}, fact |-> "WritesRefused", to |-> "=", guards |-> <<>>, update |-> <<"note_refusal">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* ENGINES 4: whose bytes are refused has drained
    [from |-> {"Bootstrapping"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_bootstrap">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"decode_bootstrap_deadline", {"armed"}>>>>, cause |-> "bootstrap_timeout"], \* B40
    [from |-> {"WaitingForInput"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_admission">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"decode_bootstrap_deadline", {"armed"}>>>>, cause |-> "admission_timeout"], \* B40
    [from |-> {"WaitingForInput"}, fact |-> "DeadlineReached", to |-> "Failed", guards |-> <<"timer_is_waiting">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<>>, cause |-> "waiting_timeout"], \* D5
    [from |-> {"Retired"}, fact |-> "DeadlineReached", to |-> "Absent", guards |-> <<"timer_is_tombstone">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* A11
    [from |-> {"WaitingForInput"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<"memory_is_exposed">>, update |-> <<>>, actions |-> <<<<"SendMetadata", "None">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Failed"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<"has_routes">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Retired"}, fact |-> "LinkRestored", to |-> "=", guards |-> <<"has_routes", "remembers_failure", "not_all_have_drained">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>>>, when |-> <<<<"resend_on_reconnect", {"yes"}>>>>, cause |-> "None"], \* B63
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "Retired", guards |-> <<"memory_is_back">>, update |-> <<>>, actions |-> <<<<"ArmDeadline", "tombstone">>>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"], \* D10, A11
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "=", guards |-> <<>>, update |-> <<"mark_cleared">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"], \* D10: the lease retires the room when it is quiet
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "Absent", guards |-> <<"memory_is_back">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"], \* D10
    [from |-> {"Success", "Failed"}, fact |-> "Cleared", to |-> "=", guards |-> <<>>, update |-> <<"mark_cleared">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"] \* D10: _deferred_releases
  >>,
  ignored |-> <<
    <<"RivalOpened", {"Absent", "Retired"}>>,
    <<"PagesReserved", {"WaitingForInput"}>>,
    <<"RoutesResolved", {"Absent", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"RouteUnavailable", {"Absent", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"SetupFinished", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"StatusReceived", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"AbortRequested", {"Absent", "Success", "Failed", "Retired"}>>,
    <<"AbortAcknowledged", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Retired"}>>,
    <<"PeerSuspected", {"Absent", "Success", "Failed", "Retired"}>>,
    <<"PeerDied", {"Absent", "Success", "Retired"}>>,
    <<"WritesRefused", {"Absent", "Success", "Retired"}>>,
    <<"DeadlineReached", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"LinkRestored", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"Cleared", {"Absent", "Retired"}>>
  >>,
  illegal |-> <<
    <<"RequestOpened", {"Bootstrapping", "WaitingForInput", "Success", "Failed"}>>,
    <<"WritesRefused", {"Bootstrapping", "WaitingForInput"}>>,
    <<"PagesReserved", {"Absent", "Bootstrapping", "Success", "Failed", "Retired"}>>,
    <<"MetadataSent", {"Absent", "Bootstrapping", "WaitingForInput", "Success", "Failed", "Retired"}>>,
    <<"Cleared", {"Bootstrapping", "WaitingForInput"}>>
  >>,
  lease |-> [
    states |-> {"Unreserved", "Reserved", "Exposed", "Draining", "Quarantined", "Settled", "Released"},
    initial |-> "Unreserved",
    terminal |-> {},
    facts |-> {"PagesReserved", "MetadataSent", "AbortRequested", "DeadlineReached"},
    rows |-> <<
      [from |-> {"Unreserved"}, fact |-> "PagesReserved", to |-> "Reserved", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
      [from |-> {"Reserved", "Exposed"}, fact |-> "MetadataSent", to |-> "Exposed", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
      [from |-> {"Settled"}, fact |-> "AbortRequested", to |-> "Released", guards |-> <<"is_not_committed">>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* given up after Success and before commit: the writes are known to be over
      [from |-> {"Draining"}, fact |-> "DeadlineReached", to |-> "Released", guards |-> <<"timer_is_drain">>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<<<"release_requires_quiescence", {"proof_or_timeout"}>>>>, cause |-> "None"], \* C9; breaks S1
      [from |-> {"Draining"}, fact |-> "DeadlineReached", to |-> "Quarantined", guards |-> <<"timer_is_drain">>, update |-> <<>>, actions |-> <<<<"QuarantinePages", "None">>, <<"NotifyPrefill", "Abort">>, <<"ArmDeadline", "drain">>>>, when |-> <<<<"release_requires_quiescence", {"proof"}>>>>, cause |-> "None"], \* A01
      [from |-> {"Quarantined"}, fact |-> "DeadlineReached", to |-> "=", guards |-> <<"timer_is_drain">>, update |-> <<>>, actions |-> <<<<"NotifyPrefill", "Abort">>, <<"ArmDeadline", "drain">>>>, when |-> <<>>, cause |-> "None"] \* asks again until the writer answers or is proven dead
    >>,
    ignored |-> <<
      <<"PagesReserved", {"Reserved", "Exposed"}>>,
      <<"AbortRequested", {"Unreserved", "Reserved", "Exposed", "Draining", "Quarantined", "Settled", "Released"}>>,
      <<"DeadlineReached", {"Unreserved", "Reserved", "Exposed", "Draining", "Quarantined", "Settled", "Released"}>>
    >>,
    illegal |-> <<
      <<"PagesReserved", {"Draining", "Quarantined", "Settled", "Released"}>>,
      <<"MetadataSent", {"Unreserved", "Draining", "Quarantined", "Settled", "Released"}>>
    >>],
  joint |-> <<
    [polls |-> {"Success"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Settled", to |-> "Settled", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* every expected write has landed; the request now owns the pages
    [polls |-> {"Success"}, leases |-> {"Unreserved", "Reserved"}, to_poll |-> "=", to_lease |-> "Settled", to |-> "Settled", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"identity", {"room"}>>>>, cause |-> "None"], \* success before publication; breaks S5
    [polls |-> {"Failed"}, leases |-> {"Settled"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<<<"success_is_final", {"no"}>>>>, cause |-> "None"], \* abort after Success: the writes are known to be over
    [polls |-> {"Failed"}, leases |-> {"Reserved"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* nobody else knows the addresses
    [polls |-> {"Failed"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReleasePages", "None">>>>, when |-> <<<<"release_requires_quiescence", {"never"}>>>>, cause |-> "None"], \* A01; breaks S1
    [polls |-> {"Failed"}, leases |-> {"Exposed", "Draining", "Quarantined"}, to_poll |-> "=", to_lease |-> "Released", to |-> "Released", guards |-> <<"all_have_drained">>, update |-> <<>>, actions |-> <<<<"CancelDeadline", "drain">>, <<"ReleasePages", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 12
    [polls |-> {"Failed"}, leases |-> {"Exposed"}, to_poll |-> "=", to_lease |-> "Draining", to |-> "Draining", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ArmDeadline", "drain">>>>, when |-> <<>>, cause |-> "None"], \* A01
    [polls |-> {"Success", "Failed"}, leases |-> {"Unreserved", "Settled", "Released"}, to_poll |-> "Retired", to_lease |-> "=", to |-> "=", guards |-> <<"was_cleared">>, update |-> <<>>, actions |-> <<<<"ArmDeadline", "tombstone">>>>, when |-> <<<<"clear_leaves", {"tombstone"}>>>>, cause |-> "None"],
    [polls |-> {"Success", "Failed"}, leases |-> {"Unreserved", "Settled", "Released"}, to_poll |-> "Absent", to_lease |-> "=", to |-> "=", guards |-> <<"was_cleared">>, update |-> <<"forget">>, actions |-> <<>>, when |-> <<<<"clear_leaves", {"nothing"}>>>>, cause |-> "None"]
  >>,
  stale |-> <<
    <<"RequestOpened", <<<<"RejectRequest", "None">>>>>>
  >>]

\* ---- registration: a prefill rank's registration with the bootstrap server

Role_registration == [
  states |-> {"Unregistered", "Registering", "Registered", "Exhausted", "Leaving", "Left"},
  initial |-> "Unregistered",
  terminal |-> {},
  facts |-> {"Started", "RegistrationAccepted", "RegistrationFailed", "RetryDue", "ServerRestarted", "LeaveRequested", "UnregistrationAnswered"},
  rows |-> <<
    [from |-> {"Unregistered"}, fact |-> "Started", to |-> "Registering", guards |-> <<>>, update |-> <<"count_attempt">>, actions |-> <<<<"SendRegistration", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 6
    [from |-> {"Registering", "Exhausted"}, fact |-> "RegistrationAccepted", to |-> "=", guards |-> <<"server_was_replaced">>, update |-> <<"first_attempt">>, actions |-> <<<<"SendRegistration", "None">>>>, when |-> <<>>, cause |-> "None"], \* the answer of a server that is gone; its successor knows nothing (found by exploration)
    [from |-> {"Registering"}, fact |-> "RegistrationAccepted", to |-> "Registered", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Exhausted"}, fact |-> "RegistrationAccepted", to |-> "Registered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReportHealthy", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Registering"}, fact |-> "RegistrationFailed", to |-> "=", guards |-> <<"server_was_replaced">>, update |-> <<"no_attempt">>, actions |-> <<<<"ArmRetry", "None">>>>, when |-> <<>>, cause |-> "None"], \* a new series for a new server
    [from |-> {"Registering"}, fact |-> "RegistrationFailed", to |-> "=", guards |-> <<"attempts_left">>, update |-> <<>>, actions |-> <<<<"ArmRetry", "None">>>>, when |-> <<>>, cause |-> "None"], \* sglang#25125
    [from |-> {"Registering"}, fact |-> "RegistrationFailed", to |-> "Exhausted", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReportUnhealthy", "None">>, <<"ArmRetry", "None">>>>, when |-> <<<<"register_exhausted", {"unhealthy_keep_trying"}>>>>, cause |-> "None"], \* O2
    [from |-> {"Registering"}, fact |-> "RegistrationFailed", to |-> "Exhausted", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"register_exhausted", {"continue_unregistered"}>>>>, cause |-> "None"], \* PROTOCOL 14 L8; breaks L4, O2
    [from |-> {"Exhausted"}, fact |-> "RegistrationFailed", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ArmRetry", "None">>>>, when |-> <<<<"register_exhausted", {"unhealthy_keep_trying"}>>>>, cause |-> "None"],
    [from |-> {"Registering"}, fact |-> "RetryDue", to |-> "=", guards |-> <<>>, update |-> <<"count_attempt">>, actions |-> <<<<"SendRegistration", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Exhausted"}, fact |-> "RetryDue", to |-> "=", guards |-> <<>>, update |-> <<"meet_server">>, actions |-> <<<<"SendRegistration", "None">>>>, when |-> <<<<"register_exhausted", {"unhealthy_keep_trying"}>>>>, cause |-> "None"],
    [from |-> {"Registering", "Exhausted"}, fact |-> "ServerRestarted", to |-> "=", guards |-> <<>>, update |-> <<"mark_replaced">>, actions |-> <<>>, when |-> <<<<"registration_watch", {"epoch"}>>>>, cause |-> "None"], \* C5; an answer that is under way is the old server's
    [from |-> {"Registered"}, fact |-> "ServerRestarted", to |-> "Registering", guards |-> <<>>, update |-> <<"first_attempt">>, actions |-> <<<<"SendRegistration", "None">>>>, when |-> <<<<"registration_watch", {"epoch"}>>>>, cause |-> "None"], \* C5
    [from |-> {"Unregistered"}, fact |-> "LeaveRequested", to |-> "Left", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* planned scale-down; nobody has heard of it
    [from |-> {"Registering", "Registered", "Exhausted"}, fact |-> "LeaveRequested", to |-> "Leaving", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ReportUnhealthy", "None">>, <<"SendUnregistration", "None">>>>, when |-> <<>>, cause |-> "None"], \* planned scale-down
    [from |-> {"Leaving", "Left"}, fact |-> "RegistrationAccepted", to |-> "Leaving", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"SendUnregistration", "None">>>>, when |-> <<>>, cause |-> "None"], \* a PUT that was under way has listed the rank again
    [from |-> {"Leaving", "Left"}, fact |-> "RegistrationFailed", to |-> "Leaving", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"SendUnregistration", "None">>>>, when |-> <<>>, cause |-> "None"], \* C1: a PUT that was under way may have been applied unheard
    [from |-> {"Leaving"}, fact |-> "UnregistrationAnswered", to |-> "Left", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<
    <<"Started", {"Left"}>>,
    <<"RegistrationAccepted", {"Registered"}>>,
    <<"RegistrationFailed", {"Registered", "Exhausted"}>>,
    <<"RetryDue", {"Registered", "Exhausted", "Leaving", "Left"}>>,
    <<"ServerRestarted", {"Unregistered", "Registering", "Registered", "Exhausted", "Leaving", "Left"}>>,
    <<"LeaveRequested", {"Leaving", "Left"}>>,
    <<"UnregistrationAnswered", {"Left"}>>
  >>,
  illegal |-> <<
    <<"Started", {"Registering", "Registered", "Exhausted", "Leaving"}>>,
    <<"RegistrationAccepted", {"Unregistered"}>>,
    <<"RegistrationFailed", {"Unregistered"}>>,
    <<"RetryDue", {"Unregistered"}>>,
    <<"UnregistrationAnswered", {"Unregistered", "Registering", "Registered", "Exhausted"}>>
  >>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- registry: the bootstrap server's table of ranks

Role_registry == [
  states |-> {"Empty", "Partial", "Ready"},
  initial |-> "Empty",
  terminal |-> {},
  facts |-> {"RankRegistered", "RouteRequested", "RankUnregistered"},
  rows |-> <<
    [from |-> {"Empty", "Partial", "Ready"}, fact |-> "RankRegistered", to |-> "Ready", guards |-> <<"registration_completes">>, update |-> <<"enter_rank">>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 6
    [from |-> {"Empty", "Partial"}, fact |-> "RankRegistered", to |-> "Partial", guards |-> <<>>, update |-> <<"enter_rank">>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 6
    [from |-> {"Empty", "Partial"}, fact |-> "RouteRequested", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerNotReady", "None">>>>, when |-> <<>>, cause |-> "None"], \* B44
    [from |-> {"Ready"}, fact |-> "RouteRequested", to |-> "=", guards |-> <<"rank_is_known">>, update |-> <<>>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Ready"}, fact |-> "RouteRequested", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerUnknownRank", "None">>>>, when |-> <<>>, cause |-> "None"], \* C1
    [from |-> {"Partial", "Ready"}, fact |-> "RankUnregistered", to |-> "=", guards |-> <<"a_later_life_is_listed">>, update |-> <<>>, actions |-> <<<<"AnswerStale", "None">>>>, when |-> <<>>, cause |-> "None"], \* a predecessor's late goodbye
    [from |-> {"Partial", "Ready"}, fact |-> "RankUnregistered", to |-> "Empty", guards |-> <<"is_the_last_rank">>, update |-> <<"remove_rank">>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"], \* planned scale-down
    [from |-> {"Partial", "Ready"}, fact |-> "RankUnregistered", to |-> "Partial", guards |-> <<"rank_is_listed">>, update |-> <<"remove_rank">>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"], \* planned scale-down
    [from |-> {"Empty", "Partial", "Ready"}, fact |-> "RankUnregistered", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerUnknownRank", "None">>>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<>>,
  illegal |-> <<
    <<"RankRegistered", {"Ready"}>>
  >>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- dp_entry: the bootstrap server's record of which DP rank runs a room

Role_dp_entry == [
  states |-> {"Unknown", "Known"},
  initial |-> "Unknown",
  terminal |-> {},
  facts |-> {"DpRankRegistered", "DpRankQueried", "EntryExpired"},
  rows |-> <<
    [from |-> {"Unknown", "Known"}, fact |-> "DpRankRegistered", to |-> "Known", guards |-> <<>>, update |-> <<"enter_dp_rank">>, actions |-> <<<<"ArmDeadline", "entry">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 9
    [from |-> {"Known"}, fact |-> "DpRankQueried", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerRoute", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Known"}, fact |-> "EntryExpired", to |-> "Unknown", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"] \* PROTOCOL 6
  >>,
  ignored |-> <<
    <<"DpRankQueried", {"Unknown"}>>,
    <<"EntryExpired", {"Unknown"}>>
  >>,
  illegal |-> <<>>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- resolution: how a decode rank learns which prefill DP rank runs a request

Role_resolution == [
  states |-> {"Unresolved", "Querying", "Resolved"},
  initial |-> "Unresolved",
  terminal |-> {"Resolved"},
  facts |-> {"TopologyLearned", "DpRankAnswered", "RetryDue"},
  rows |-> <<
    [from |-> {"Unresolved"}, fact |-> "TopologyLearned", to |-> "Resolved", guards |-> <<"one_dp_rank">>, update |-> <<"resolve_zero">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 9
    [from |-> {"Unresolved"}, fact |-> "TopologyLearned", to |-> "Resolved", guards |-> <<"follows_the_room">>, update |-> <<"resolve_by_room">>, actions |-> <<>>, when |-> <<<<"dp_lookup", {"derive"}>>>>, cause |-> "None"], \* PROTOCOL 9
    [from |-> {"Unresolved"}, fact |-> "TopologyLearned", to |-> "Querying", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"QueryDpRank", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 9
    [from |-> {"Querying"}, fact |-> "DpRankAnswered", to |-> "Resolved", guards |-> <<"answer_is_known">>, update |-> <<"resolve_by_answer">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Querying"}, fact |-> "DpRankAnswered", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"ArmRetry", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Querying"}, fact |-> "RetryDue", to |-> "=", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"QueryDpRank", "None">>>>, when |-> <<>>, cause |-> "None"] \* PROTOCOL 9
  >>,
  ignored |-> <<
    <<"RetryDue", {"Unresolved", "Resolved"}>>,
    <<"TopologyLearned", {"Querying", "Resolved"}>>,
    <<"DpRankAnswered", {"Unresolved", "Resolved"}>>
  >>,
  illegal |-> <<>>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- peer: failure detector: what one process believes of another

Role_peer == [
  states |-> {"Alive", "Suspect", "Lost"},
  initial |-> "Alive",
  terminal |-> {},
  facts |-> {"ProbeAnswered", "ProbeMissed"},
  rows |-> <<
    [from |-> {"Alive", "Suspect", "Lost"}, fact |-> "ProbeAnswered", to |-> "Alive", guards |-> <<"epoch_is_new">>, update |-> <<"believe_epoch">>, actions |-> <<<<"DeclareDead", "None">>>>, when |-> <<<<"liveness_probe", {"rank_epoch"}>>>>, cause |-> "None"], \* A21
    [from |-> {"Alive", "Suspect", "Lost"}, fact |-> "ProbeAnswered", to |-> "Alive", guards |-> <<>>, update |-> <<"believe_epoch">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Alive", "Suspect"}, fact |-> "ProbeMissed", to |-> "Lost", guards |-> <<"miss_is_last">>, update |-> <<"count_miss">>, actions |-> <<<<"DeclareSuspected", "None">>>>, when |-> <<>>, cause |-> "None"], \* PROTOCOL 11
    [from |-> {"Alive", "Suspect"}, fact |-> "ProbeMissed", to |-> "Suspect", guards |-> <<>>, update |-> <<"count_miss">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<
    <<"ProbeMissed", {"Lost"}>>
  >>,
  illegal |-> <<>>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- prefill_request: where a request stands in a prefill rank's scheduler

Role_prefill_request == [
  states |-> {"Unqueued", "Bootstrap", "Waiting", "Inflight", "Done"},
  initial |-> "Unqueued",
  terminal |-> {"Done"},
  facts |-> {"RequestArrived", "AdmissionAgreed", "DropAgreed", "ForwardFinished", "TransferAgreed"},
  rows |-> <<
    [from |-> {"Unqueued"}, fact |-> "RequestArrived", to |-> "Bootstrap", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Bootstrap"}, fact |-> "AdmissionAgreed", to |-> "Waiting", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Bootstrap", "Waiting", "Inflight"}, fact |-> "DropAgreed", to |-> "Done", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Waiting"}, fact |-> "ForwardFinished", to |-> "Inflight", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Inflight"}, fact |-> "TransferAgreed", to |-> "Done", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<
    <<"AdmissionAgreed", {"Waiting", "Inflight", "Done"}>>,
    <<"DropAgreed", {"Done", "Unqueued"}>>,
    <<"TransferAgreed", {"Done"}>>,
    <<"ForwardFinished", {"Done"}>>
  >>,
  illegal |-> <<
    <<"RequestArrived", {"Bootstrap", "Waiting", "Inflight", "Done"}>>,
    <<"AdmissionAgreed", {"Unqueued"}>>,
    <<"ForwardFinished", {"Unqueued", "Bootstrap", "Inflight"}>>,
    <<"TransferAgreed", {"Unqueued", "Bootstrap", "Waiting"}>>
  >>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- decode_request: where a request stands in a decode rank's scheduler

Role_decode_request == [
  states |-> {"Unqueued", "Preallocation", "Transfer", "Running", "Done"},
  initial |-> "Unqueued",
  terminal |-> {"Done"},
  facts |-> {"RequestArrived", "MemoryGranted", "TransferAgreed", "DropAgreed", "GenerationFinished"},
  rows |-> <<
    [from |-> {"Unqueued"}, fact |-> "RequestArrived", to |-> "Preallocation", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Preallocation"}, fact |-> "MemoryGranted", to |-> "Transfer", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Transfer"}, fact |-> "TransferAgreed", to |-> "Running", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Preallocation", "Transfer", "Running"}, fact |-> "DropAgreed", to |-> "Done", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Running"}, fact |-> "GenerationFinished", to |-> "Done", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<
    <<"DropAgreed", {"Done", "Unqueued"}>>,
    <<"GenerationFinished", {"Done"}>>,
    <<"TransferAgreed", {"Running", "Done"}>>
  >>,
  illegal |-> <<
    <<"RequestArrived", {"Preallocation", "Transfer", "Running", "Done"}>>,
    <<"MemoryGranted", {"Unqueued", "Transfer", "Running", "Done"}>>,
    <<"TransferAgreed", {"Unqueued", "Preallocation"}>>,
    <<"GenerationFinished", {"Unqueued", "Preallocation", "Transfer"}>>
  >>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- collective: one collective of a rank group

Role_collective == [
  states |-> {"Open", "Complete", "Mismatched"},
  initial |-> "Open",
  terminal |-> {"Complete", "Mismatched"},
  facts |-> {"RankEntered"},
  rows |-> <<
    [from |-> {"Open"}, fact |-> "RankEntered", to |-> "Mismatched", guards |-> <<"shape_differs">>, update |-> <<"enter_collective">>, actions |-> <<<<"BlockRanks", "None">>>>, when |-> <<>>, cause |-> "None"], \* A14: gloo and NCCL hang
    [from |-> {"Open"}, fact |-> "RankEntered", to |-> "Complete", guards |-> <<"everyone_entered">>, update |-> <<"enter_collective">>, actions |-> <<<<"DeliverDecision", "None">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Open"}, fact |-> "RankEntered", to |-> "=", guards |-> <<>>, update |-> <<"enter_collective">>, actions |-> <<>>, when |-> <<>>, cause |-> "None"]
  >>,
  ignored |-> <<
    <<"RankEntered", {"Mismatched"}>>
  >>,
  illegal |-> <<
    <<"RankEntered", {"Complete"}>>
  >>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

\* ---- router: the router's view of one request: two legs, one answer

Role_router == [
  states |-> {"Waiting", "HalfFailed", "Answered"},
  initial |-> "Waiting",
  terminal |-> {"Answered"},
  facts |-> {"DecodeAnswered", "LegFailed", "ClientLeft"},
  rows |-> <<
    [from |-> {"Waiting"}, fact |-> "DecodeAnswered", to |-> "Answered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerClient", "ok">>>>, when |-> <<>>, cause |-> "None"],
    [from |-> {"Waiting"}, fact |-> "LegFailed", to |-> "Answered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerClient", "failed">>, <<"CancelLeg", "None">>>>, when |-> <<<<"router_join", {"first_failure_cancels"}>>>>, cause |-> "detail"], \* A09
    [from |-> {"Waiting"}, fact |-> "LegFailed", to |-> "HalfFailed", guards |-> <<>>, update |-> <<>>, actions |-> <<>>, when |-> <<<<"router_join", {"waits_for_both"}>>>>, cause |-> "detail"], \* A09
    [from |-> {"HalfFailed"}, fact |-> "LegFailed", to |-> "Answered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerClient", "failed">>>>, when |-> <<<<"router_join", {"waits_for_both"}>>>>, cause |-> "None"], \* A09
    [from |-> {"HalfFailed"}, fact |-> "DecodeAnswered", to |-> "Answered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerClient", "failed">>, <<"CancelLeg", "None">>>>, when |-> <<<<"router_join", {"waits_for_both"}>>>>, cause |-> "None"],
    [from |-> {"Waiting", "HalfFailed"}, fact |-> "ClientLeft", to |-> "Answered", guards |-> <<>>, update |-> <<>>, actions |-> <<<<"AnswerClient", "failed">>, <<"CancelLeg", "None">>>>, when |-> <<>>, cause |-> "client_left"]
  >>,
  ignored |-> <<
    <<"DecodeAnswered", {"Answered", "HalfFailed"}>>,
    <<"LegFailed", {"Answered", "HalfFailed"}>>,
    <<"ClientLeft", {"Answered"}>>
  >>,
  illegal |-> <<>>,
  lease |-> [
    states |-> {}, initial |-> "None", terminal |-> {}, facts |-> {},
    rows |-> <<>>, ignored |-> <<>>, illegal |-> <<>>],
  joint |-> <<>>,
  stale |-> <<>>]

Roles == [
  sender |-> Role_sender,
  receiver |-> Role_receiver,
  registration |-> Role_registration,
  registry |-> Role_registry,
  dp_entry |-> Role_dp_entry,
  resolution |-> Role_resolution,
  peer |-> Role_peer,
  prefill_request |-> Role_prefill_request,
  decode_request |-> Role_decode_request,
  collective |-> Role_collective,
  router |-> Role_router]

===============================================================================
