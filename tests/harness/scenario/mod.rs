//! Scenarios as text files: a script of commands, and under each what the shipped protocols do.
//!
//! One `Primary` and one `Secondary` are driven directly, without chance: what threads, link, witness and clients do is
//! a command of the script. The hosts' disks are real replicas over simulated media, the witness a real directory.
//!
//! Two rules hold whatever a file expects: a checkpoint is loaded as exactly the state that it was stopped in, and no
//! generation lets output leave after a later one did. Driven by `tests/scenarios.rs`.

mod checks;
mod commands;
mod forge;
mod frames;
mod host;
mod link;
mod orders;
mod pair;
mod processor;
mod script;
mod show;
mod starts;

use pair::Pair;
use script::Script;

/// Runs a scenario; returns its text with what was printed in the place of what was expected.
///
/// # Errors
/// Names the line of a command that can't be carried out, or that has no expectation.
pub fn run(text: &str) -> Result<String, String> {
    let script = Script::parse(text)?;
    let mut pair = Pair::new();
    let mut outputs = Vec::new();
    for block in script.blocks() {
        let mut printed = Vec::new();
        for (line, command) in &block.commands {
            commands::run(&mut pair, command).map_err(|error| format!("line {line}: '{command}': {error}"))?;
            let output = core::mem::take(&mut pair.output);
            if block.commands.len() > 1 && !output.is_empty() {
                printed.push(format!("> {command}"));
            }
            printed.extend(output);
        }
        if printed.is_empty() {
            printed.push("ok".to_owned());
        }
        outputs.push(printed.join("\n"));
    }
    Ok(script.with_outputs(&outputs))
}

/// Compares a scenario's text with what a run of it gave.
///
/// # Errors
/// Shows the first line that differs.
pub fn compare(expected: &str, found: &str) -> Result<(), String> {
    script::first_difference(expected, found).map_or(Ok(()), Err)
}
