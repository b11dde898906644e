//! Deliberate bugs, to test the tests: each breaks a rule, and the simulation must notice.
//!
//! Without the feature `mutants` [`on`] is the constant `false` and nothing of this is in a program. With it,
//! [`with`] makes one of them active in the calling thread. No shipped program enables the feature: `tandem` does not
//! compile with it. `docs/TESTING.md` tells how to add one.

macro_rules! mutants {
    ($($(#[doc = $rule:literal])+ $variant:ident $name:literal)+) => {
        /// A deliberate bug; the text of each says what goes wrong.
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[doc = $rule])+ $variant,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Returns its name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

mutants! {
    /// The answer to an old claim counts for the one that is open.
    AcceptOldAnswer "accept-old-answer"
    /// The acknowledgement of a checkpoint counts for the one that is awaited.
    AcceptOldEpoch "accept-old-epoch"
    /// The secondary acknowledges a checkpoint before it has decided that it is complete.
    AcknowledgeEarly "acknowledge-early"
    /// An acknowledgement of the primary leaves though the secondary's guest has not acknowledged as much.
    AcknowledgeUnconfirmed "acknowledge-unconfirmed"
    /// A side that contends tells the network that the VM is here.
    AnnounceBeforeWinning "announce-before-winning"
    /// A secondary that has lost a connection goes on renewing the primary's lease.
    AnswerInTheContest "answer-in-the-contest"
    /// A commit's disk writes go into the base before its journal is durable.
    ApplyBeforeJournal "apply-before-journal"
    /// Pages of a checkpoint go into the committed image before the checkpoint is complete.
    ApplyPagesEarly "apply-pages-early"
    /// A claim that the witness did not answer is not repeated.
    ClaimOnce "claim-once"
    /// A side that contends claims the term that it follows, not the next.
    ClaimOwnTerm "claim-own-term"
    /// Of a segment whose first bytes only both sides have said, all leave.
    BeginTooMuch "begin-too-much"
    /// Blocks count as equal on both disks once their checkpoint is acknowledged, before it is durable.
    ClearChangedOnAcknowledgement "clear-changed-on-acknowledgement"
    /// The commit of an epoch covers the output of the first network card only.
    CommitFirstCardOnly "commit-first-card-only"
    /// A checkpoint commits the disk writes of the epoch after it, too.
    CommitNextWrites "commit-next-writes"
    /// A checkpoint makes the secondary's own speculative writes part of the disk.
    CommitOverlay "commit-overlay"
    /// The first checkpoint is committed before the record says that the image is complete.
    CommitUnrecorded "commit-unrecorded"
    /// A page that is shipped ahead is read before it counts as clean.
    CopyBeforeClear "copy-before-clear"
    /// A segment whose beginning was equal counts as equal to its end.
    CompareBySegment "compare-by-segment"
    /// Two frames of the same length count as equal.
    CompareLengths "compare-lengths"
    /// A checkpoint counts as complete as soon as the pages of one of its streams have come.
    CompleteByOneStream "complete-by-one-stream"
    /// Pages are compared with those of a VM that runs on.
    CompareRunning "compare-running"
    /// A secondary that said goodbye, or heard it, contends.
    ContendAfterGoodbye "contend-after-goodbye"
    /// A secondary contends before it holds a complete state.
    ContendIncomplete "contend-incomplete"
    /// A connection that broke counts as one that the primary's kernel ended.
    ContendWithinLease "contend-within-lease"
    /// The pages that the secondary has alike are copied only after its guest's writes have been reverted.
    CopyAfterRevert "copy-after-revert"
    /// A page is encoded as the difference from what was shipped of it last, committed or not.
    DeltaFromShipped "delta-from-shipped"
    /// Sending the first checkpoint does not make the peer one that may contend.
    EntitleLate "entitle-late"
    /// A takeover makes the primary's uncommitted disk writes part of the disk.
    FoldBuffers "fold-buffers"
    /// The pages of an abandoned checkpoint count as clean.
    ForgetAbandonedPages "forget-abandoned-pages"
    /// Pages that were shipped ahead in an epoch that was abandoned count as clean.
    ForgetPagesAhead "forget-pages-ahead"
    /// The blocks written in an abandoned epoch do not count as changed.
    ForgetAbandonedWrites "forget-abandoned-writes"
    /// What the guest discards does not count as changed.
    ForgetDiscards "forget-discards"
    /// A side that takes over translates no connection any more.
    ForgetOffsets "forget-offsets"
    /// After a takeover segments leave with times before those that the client has seen.
    ForgetClock "forget-clock"
    /// A primary that lost its secondary goes on without asking the witness.
    GoAloneUnasked "go-alone-unasked"
    /// Bytes leave though only the secondary's guest has marked one of them as urgent.
    IgnoreUrgent "ignore-urgent"
    /// The end of a TCP stream leaves though the secondary's guest has not ended it.
    IgnoreFin "ignore-fin"
    /// Released frames carry no time after which they must not leave.
    IgnoreLease "ignore-lease"
    /// Fragments of different datagrams are put together.
    JoinFragments "join-fragments"
    /// What an earlier secondary has committed counts as committed by the next.
    KeepBaseOfAnother "keep-base-of-another"
    /// A load takes over the translation offsets of the first network card only.
    KeepFirstCardOnly "keep-first-card-only"
    /// A load does not take over the primary's translation offsets.
    KeepOwnNetwork "keep-own-network"
    /// What the guest sent in an execution that a checkpoint replaced is kept for the takeover.
    KeepReplacedOutput "keep-replaced-output"
    /// The lease counts from when the peer was last heard, not from when what it echoes was sent.
    LeaseFromHearing "lease-from-hearing"
    /// A segment whose acknowledgement is to be lowered leaves as it is.
    LowerNothing "lower-nothing"
    /// After a takeover in its handshake a stream is compared from where it would begin in this side's own numbers.
    KeepOwnNumbers "keep-own-numbers"
    /// A disk write marks only the first of its blocks as changed.
    MarkFirstBlock "mark-first-block"
    /// A guest that follows goes on sending though its output does not get through to the primary.
    OutrunTheData "outrun-the-data"
    /// The primary goes on reading its network though too many inputs are unconfirmed.
    OutrunTheInputs "outrun-the-inputs"
    /// Output of the primary from after a stop is compared with the secondary's from before it.
    MatchAcrossEpochs "match-across-epochs"
    /// Disk writes between a trigger and the stop are not mirrored.
    MirrorStopsAtTrigger "mirror-stops-at-trigger"
    /// A guest runs on though its epoch is full and can't end yet.
    OutrunTheLink "outrun-the-link"
    /// A guest goes on writing pages though those of its epoch take all the memory that they may.
    OutgrowTheMemory "outgrow-the-memory"
    /// A secondary does not ask for a checkpoint when its own pages take all the memory that they may.
    OwnPagesUncounted "own-pages-uncounted"
    /// Pages that were to be shipped ahead and were not read before the stop are read after it.
    ReadAheadAfterStop "read-ahead-after-stop"
    /// An acknowledgement leaves before the SYN or RST that the guest sent before it.
    OvertakeReset "overtake-reset"
    /// Bytes that were said before leave again, whatever they are now.
    PassRepeated "pass-repeated"
    /// Reads don't see a commit whose disk writes are still under way.
    ReadOldBase "read-old-base"
    /// What is released on any network card leaves by the first.
    ReleaseOnFirstCard "release-on-first-card"
    /// Output leaves as covered by a checkpoint once that has been copied.
    ReleaseAtTheCopy "release-at-the-copy"
    /// Output leaves as covered by a checkpoint once that has been sent.
    ReleaseBeforeAcknowledgement "release-before-acknowledgement"
    /// A commit releases what is held of the epoch after it, too.
    ReleaseNextEpoch "release-next-epoch"
    /// The journal is retired before the base is durable.
    RetireBeforeFlush "retire-before-flush"
    /// An abandoned epoch's number is used again.
    ReuseEpoch "reuse-epoch"
    /// A side that took over goes on from the last committed epoch's number.
    ReuseEpochAtTakeover "reuse-epoch-at-takeover"
    /// A side runs though the witness gave the term to the other.
    RunAfterLosing "run-after-losing"
    /// What was overtaken leaves with its own time, before that of what overtook it.
    SendOldTimes "send-old-times"
    /// A side that won runs before the record of that is durable.
    RunBeforeRecord "run-before-record"
    /// A checkpoint has what the guest wrote into its memory, and not what the machine wrote for it.
    SkipMachineWrites "skip-machine-writes"
    /// A first start that was cut short twice is taken for that of a foreign image.
    SkipTermAtFirstStart "skip-term-at-first-start"
    /// A secondary that lost the contest waits for a primary again before its last checkpoint is loaded and durable.
    StandDownEarly "stand-down-early"
    /// A host starts alone in a state that the owner of the generation may have left behind.
    StartFollower "start-follower"
    /// A host starts alone though another has owned the VM since.
    StartSuperseded "start-superseded"
    /// The peer counts as lost after half the time that its lease relies on.
    SuspectTooSoon "suspect-too-soon"
    /// An epoch's mode changes when its end is asked for, not at its end.
    SwitchAtTheTrigger "switch-at-the-trigger"
    /// A page that was shipped ahead is left out at the stop though it is dirty again.
    TrustPagesAhead "trust-pages-ahead"
    /// A takeover after the commit point is in the state before it.
    TakeOverInOldState "take-over-in-old-state"
    /// A journal counts as complete whatever its digest says.
    TrustJournal "trust-journal"
    /// A witness that does not answer counts as one that was won.
    UnreachableIsWon "unreachable-is-won"
    /// Flows that the two guests have opened from different ports wait for the whole bound.
    WaitForAnotherPort "wait-for-another-port"
}

impl Mutant {
    /// Those about frames that no guest of the simulated world sends, or hardly any: sequences made for them must notice these.
    pub const SEQUENCES_ONLY: &[Self] = &[
        Self::BeginTooMuch,
        Self::ForgetClock,
        Self::IgnoreUrgent,
        Self::JoinFragments,
        Self::KeepOwnNumbers,
        Self::OvertakeReset,
        Self::PassRepeated,
        Self::SendOldTimes,
        Self::WaitForAnotherPort,
    ];
}

/// Whether this build can have mutants.
pub const ENABLED: bool = cfg!(feature = "mutants");

#[cfg(not(feature = "mutants"))]
/// Tells whether this mutant is active: never.
#[inline(always)]
#[must_use]
pub const fn on(_: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use active::{on, reached, with};

#[cfg(feature = "mutants")]
mod active {
    use core::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
        static REACHED: Cell<u64> = const { Cell::new(0) };
    }

    /// Tells whether this mutant is active in this thread.
    #[must_use]
    pub fn on(mutant: Mutant) -> bool {
        let on = ACTIVE.get() == Some(mutant);
        REACHED.set(REACHED.get() + u64::from(on));
        on
    }

    /// Calls the function with this mutant active in this thread; one that panics leaves it so.
    pub fn with<T>(mutant: Mutant, function: impl FnOnce() -> T) -> T {
        ACTIVE.set(Some(mutant));
        REACHED.set(0);
        let result = function();
        ACTIVE.set(None);
        result
    }

    /// Returns how often the last mutant of this thread was asked for and active.
    #[must_use]
    pub fn reached() -> u64 {
        REACHED.get()
    }
}
