//! The text of a scenario: comments, blocks of commands, and what is expected under each.
//!
//! ```text
//! # A story, for the reader.
//! command                     # a remark
//! another command
//! ----
//! what they are expected to print
//!
//! ```
//!
//! Driven by the runner. Knows nothing of what a command means.

/// A scenario's text.
pub(super) struct Script {
    parts: Vec<Part>,
}

enum Part {
    /// Comments and empty lines, as they are.
    Text(String),
    Block(Block),
}

/// Some commands and what they print.
pub(super) struct Block {
    /// Each with the number of its line.
    pub(super) commands: Vec<(usize, String)>,
    expected: String,
}

impl Script {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// Names the line of a command without an expectation, and a file without any.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut commands = Vec::new();
        let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim_end()));
        while let Some((number, line)) = lines.next() {
            if line == "----" {
                if commands.is_empty() {
                    return Err(format!("line {number}: an expectation without a command"));
                }
                let expected: Vec<&str> = lines
                    .by_ref()
                    .map(|(_, line)| line)
                    .take_while(|line| !line.is_empty())
                    .collect();
                if expected.is_empty() {
                    return Err(format!("line {number}: nothing is expected; 'ok' stands for no output"));
                }
                parts.push(Part::Block(Block {
                    commands: core::mem::take(&mut commands),
                    expected: expected.join("\n"),
                }));
                parts.push(Part::Text(String::new()));
            } else if line.is_empty() || line.starts_with('#') {
                if let Some((number, command)) = commands.first() {
                    return Err(format!("line {number}: '{command}' has no expectation under it"));
                }
                parts.push(Part::Text(line.to_owned()));
            } else {
                commands.push((number, line.to_owned()));
            }
        }
        if let Some((number, command)) = commands.first() {
            return Err(format!("line {number}: '{command}' has no expectation under it"));
        }
        let script = Self { parts };
        if !text.starts_with('#') {
            return Err("line 1: the file does not begin with what it is about".to_owned());
        }
        if script.blocks().next().is_none() {
            return Err("it has no command".to_owned());
        }
        Ok(script)
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.parts.iter().filter_map(|part| match part {
            Part::Block(block) => Some(block),
            Part::Text(_) => None,
        })
    }

    /// Writes the text with these outputs, one for each block; what has none keeps what was expected.
    pub(super) fn with_outputs(&self, outputs: &[String]) -> String {
        let mut outputs = outputs.iter();
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(line) => text.push_str(line),
                Part::Block(block) => {
                    for (_, command) in &block.commands {
                        text.push_str(command);
                        text.push('\n');
                    }
                    text.push_str("----\n");
                    text.push_str(outputs.next().unwrap_or(&block.expected));
                }
            }
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    }
}

/// Splits a command into words; what is in double quotes is one, and keeps the first quote. A `#` word ends it.
pub(super) fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = command.trim_start();
    while !rest.is_empty() && !rest.starts_with("# ") {
        let end = if let Some(quoted) = rest.strip_prefix('"') {
            quoted.find('"').map_or(rest.len(), |at| at + 1)
        } else {
            rest.find(char::is_whitespace).unwrap_or(rest.len())
        };
        words.push(rest[..end].to_owned());
        rest = rest[end..].trim_start_matches('"').trim_start();
    }
    words
}

/// Returns the first line that differs, for the message of a failure.
pub(super) fn first_difference(expected: &str, found: &str) -> Option<String> {
    let (mut left, mut right) = (expected.lines(), found.lines());
    loop {
        match (left.next(), right.next()) {
            (None, None) => return None,
            (expected, found) if expected == found => {}
            (expected, found) => {
                return Some(format!(
                    "expected: {}\n     found: {}",
                    expected.unwrap_or("nothing more"),
                    found.unwrap_or("nothing more")
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_back_as_it_was() {
        let text = "# about\n\none\ntwo # why\n----\nprinted\n  more\n\n# end\nthree\n----\nok\n";
        let script = Script::parse(text).expect("whole");
        let outputs: Vec<String> = script.blocks().map(|block| block.expected.clone()).collect();
        assert_eq!(script.with_outputs(&outputs), text);
    }

    #[test]
    fn a_command_without_an_expectation_is_refused() {
        for text in [
            "# about\none\n",
            "# about\none\n\n----\nok\n",
            "# about\none\n----\n\n",
            "# about\n----\nok\n",
            "one\n----\nok\n",
            "# about\n",
        ] {
            assert!(Script::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn quoted_words_are_one_and_remarks_are_none() {
        assert_eq!(words("frame S1 \"a b\" seq=1 # why"), ["frame", "S1", "\"a b", "seq=1"]);
        assert_eq!(
            words("forge to b Input #9 q1"),
            ["forge", "to", "b", "Input", "#9", "q1"]
        );
    }
}
