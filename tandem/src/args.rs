//! The command line: what can be asked of `tandem`, in words.
//!
//! Only names, help and forms are here; what a command does is found in the module of its name.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::bench::Bench;
use crate::demo::DemoOptions;
use crate::options::{PairOptions, VmOptions};
use crate::units::ByteSize;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or ended in order (Ctrl-C, SIGTERM, the guest powered off)
  1  failed; the last lines say why. `demo`: something was lost
  2  an option or the configuration file is wrong; nothing was started
  3  fenced: the other side runs alone, and this one stopped for good";

const CAPTURE_HELP: &str = "\
To be run on the primary's host. The file has three interfaces: `primary` and `secondary`, what the two guests sent, and
`released`, what was let out to the clients. Each packet has a comment: the epoch in which it was sent, where it first
differed from the other side's, or why it was let out (equal on both sides, covered by a checkpoint, a repetition, ...).

  tandem capture --out x.pcapng --seconds 10
  tandem capture --out - | wireshark -k -i -        watch it live
  wireshark -Y 'frame.interface_name == \"released\"' x.pcapng
  tshark -r x.pcapng -T fields -e frame.interface_name -e frame.comment

A capture slows nobody down: packets that come faster than they are written are left out, and counted in the file.";

/// Keeps a virtual machine running when its host dies.
///
/// Two hosts run the same VM in lockstep; clients see one machine. See the whole with `tandem demo`.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Die when this parent process does.
    #[arg(long, value_name = "PID", global = true, hide = true)]
    pub parent: Option<i32>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the VM and let the other host protect it
    Primary(PairOptions),
    /// Protect the VM of the other host, and take it over when that host dies
    Secondary(PairOptions),
    /// Run the VM unprotected
    Run(VmOptions),
    /// Show a pair on this machine: clients at work, a host killed, nothing lost
    Demo(DemoOptions),
    /// Measure on this machine what protection costs
    #[command(subcommand)]
    Bench(Bench),
    /// Show how a role is
    Status(StatusOptions),
    /// Show which of the VM's traffic is protected, how, and where the two sides differ
    Flows(FlowsOptions),
    /// Write what both sides send, what is let out and why to a file for Wireshark
    Capture(CaptureOptions),
    /// Make the secondary go on without the primary, where no witness decides
    Takeover(TakeoverOptions),
    /// Take a checkpoint now
    Checkpoint(ControlOptions),
    /// End a role in order
    Stop(ControlOptions),
    /// The small process that tells the peer of a role's death.
    #[command(hide = true)]
    Sentinel,
}

/// Which role is meant.
#[derive(Args, Clone, Debug, Default)]
pub struct ControlOptions {
    /// The role's control socket [default: the only one in /run/tandem]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// What `status` is told, and others that show something.
#[derive(Args, Clone, Debug, Default)]
pub struct StatusOptions {
    /// Which role is meant.
    #[command(flatten)]
    pub control: ControlOptions,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Go on, once a second
    #[arg(long)]
    pub watch: bool,
}

/// What `flows` is told.
#[derive(Args, Clone, Debug)]
pub struct FlowsOptions {
    /// Of which role, and how it is shown.
    #[command(flatten)]
    pub shown: StatusOptions,
    /// Flows to list, at most; those that hold output and those that differed come first
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=i64::from(link::flows::FLOWS_MAX)))]
    pub most: u32,
}

/// What `capture` is told.
#[derive(Args, Clone, Debug)]
#[command(after_help = CAPTURE_HELP)]
pub struct CaptureOptions {
    /// Which role is meant.
    #[command(flatten)]
    pub control: ControlOptions,
    /// The file, in pcapng; written over if it is there. `-`: standard output
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// End after so many seconds [default: at Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub seconds: Option<u64>,
    /// End before the file is larger than this, as in 100M
    #[arg(long, value_name = "SIZE")]
    pub most: Option<ByteSize>,
}

/// What `takeover` is told.
#[derive(Args, Clone, Debug)]
pub struct TakeoverOptions {
    /// Which role is meant.
    #[command(flatten)]
    pub control: ControlOptions,
    /// You have made sure that the old primary does not run, and will not: two running VMs destroy data
    #[arg(long, required = true)]
    pub old_primary_is_off: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_misspelt_option_is_told_with_the_nearest_right_one() {
        let error = Cli::try_parse_from(["tandem", "primary", "--takeover-limt", "1s"]).unwrap_err();
        assert!(error.to_string().contains("--takeover-limit"), "{error}");
        assert_eq!(error.exit_code(), 2);
        let error = Cli::try_parse_from(["tandem", "primray"]).unwrap_err();
        assert!(error.to_string().contains("primary"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_told_with_its_cure() {
        let error = Cli::try_parse_from(["tandem", "primary", "--memory", "lots"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("'lots' is no size: write a whole number and K, M or G"),
            "{error}"
        );
    }

    #[test]
    fn takeover_must_be_meant() {
        let error = Cli::try_parse_from(["tandem", "takeover"]).unwrap_err().to_string();
        assert!(error.contains("--old-primary-is-off"), "{error}");
    }

    #[test]
    fn the_sentinel_is_hidden() {
        assert!(!Cli::command().render_help().to_string().contains("sentinel"));
    }
}
