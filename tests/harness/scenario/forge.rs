//! Messages that no honest peer sends, from the words of a script.

use bytes::Bytes;
use checkpoint::pages::identical::{PageHash, PageHashes, PageMatches};
use checkpoint::wire::{
    Begin, DiskWrite, EndMark, GoodbyeReason, Heartbeat, Held, Input, Message, Output, PageBatch, PageSum, PageSums,
    Written,
};
use checkpoint::{Epoch, EpochMode, Generation, InputNumber, Instant, Tag};

use super::frames::Frames;

/// Makes a message: `Input 2/3 #9 q1`, `Acknowledge 2/3`, `End 2/3 base=2 pages=1 writes=0 input=0`.
pub(super) fn message(frames: &mut Frames, words: &[&str]) -> Result<Message, String> {
    Ok(match *words {
        ["Begin", at] => Message::Begin(Begin {
            tag: tag(at)?,
            base: Held::default(),
        }),
        ["Want", at] => Message::Want(tag(at)?),
        ["Acknowledge", at] => Message::Acknowledge(tag(at)?),
        ["Halt", at] => Message::Halt(tag(at)?),
        ["Halted", at] => Message::Halted(tag(at)?),
        ["PageHashes", at, ref pages @ ..] => Message::PageHashes(PageHashes {
            tag: tag(at)?,
            seed: [5; 32],
            pages: pages
                .iter()
                .map(|page| Ok((after(page, "")?, PageHash([0; 16]))))
                .collect::<Result<_, String>>()?,
        }),
        ["PageMatches", at, ref alike @ ..] => Message::PageMatches(PageMatches {
            tag: tag(at)?,
            alike: alike.iter().map(|alike| *alike == "yes").collect(),
        }),
        ["Loaded", at] => Message::Loaded(tag(at)?),
        ["Committed", at] => Message::Committed(tag(at)?),
        ["Confirm", at, number] => Message::Confirm(tag(at)?, input(number)?),
        ["Input", at, number, name] => {
            let (nic, frame) = frames.at_card(name)?;
            Message::Input(Input {
                tag: tag(at)?,
                number: input(number)?,
                nic,
                frame,
            })
        }
        ["Output", at, name] => {
            let (nic, frame) = frames.at_card(name)?;
            Message::Output(Output {
                tag: tag(at)?,
                nic,
                frame,
            })
        }
        ["Pages", at, text] => Message::Pages(PageBatch::new(tag(at)?, 1, Bytes::copy_from_slice(text.as_bytes()))),
        ["Write", at, text] => Message::Write(DiskWrite {
            tag: tag(at)?,
            offset: 0,
            written: Written::Data(Bytes::copy_from_slice(&[text.as_bytes(), &[0; 512]].concat()[..512])),
        }),
        ["End", at, base, pages, writes, last] => Message::End(Box::new(EndMark {
            tag: tag(at)?,
            base: (base != "base=none")
                .then(|| after(base, "base=").map(Epoch))
                .transpose()?,
            pages: PageSums::of(&[PageSum {
                pages: after(pages, "pages=")?,
                ..PageSum::default()
            }])
            .expect("one stream"),
            writes: after(writes, "writes=")?,
            writes_digest: 0,
            sections: 1,
            input: InputNumber(after(last, "input=")?),
            next: EpochMode::default(),
            entropy: [1; 32],
        })),
        ["Heartbeat", "echo=never"] => Message::Heartbeat(Heartbeat {
            sent: Instant(1),
            echo: Instant(u64::MAX),
        }),
        ["Goodbye"] => Message::Goodbye(GoodbyeReason::Operator),
        _ => return Err("such a message can't be forged".to_owned()),
    })
}

fn tag(text: &str) -> Result<Tag, String> {
    let wrong = || format!("'{text}' is no GENERATION/EPOCH");
    let (generation, epoch) = text.split_once('/').ok_or_else(wrong)?;
    Ok(Tag {
        generation: Generation(generation.parse().map_err(|_| wrong())?),
        epoch: Epoch(epoch.parse().map_err(|_| wrong())?),
    })
}

fn input(text: &str) -> Result<InputNumber, String> {
    after(text, "#").map(InputNumber)
}

fn after(text: &str, prefix: &str) -> Result<u64, String> {
    let number = text.strip_prefix(prefix).and_then(|number| number.parse().ok());
    number.ok_or_else(|| format!("'{text}' is not {prefix}NUMBER"))
}
