// SPDX-License-Identifier: GPL-2.0

//! Faults that the device makes when it is told to.
//!
//! A rule is a line of text, `WHEN COMMAND: ACTION`:
//!
//! - `WHEN` is `3rd` (that one only), `from 3rd` (that one and all after it), or nothing or `every`;
//! - `COMMAND` is a name as in `linux/virtio_gpu.h` without `VIRTIO_GPU_CMD_`, `any`, or `fenced`
//!   for all commands with a fence;
//! - `ACTION` is one of those of [`Action`].
//!
//! Commands are counted from the moment the rule was made.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use virtio_gpu_protocol::{Command, ResponseType};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `error 0x1203`: the command is refused, and not carried out.
    Error(u32),
    /// `no answer`: the command is carried out, and its buffers are kept.
    NoAnswer,
    /// `answer after 2 s`, `answer after 300 ms`.
    Late(Duration),
    /// `wrong type` or `wrong type 0x1104`: the answer has the type of another.
    WrongType(Option<u32>),
    /// `used length 3`: so many bytes are written and reported.
    UsedLength(u32),
    /// `wrong fence id`: the answer's fence is not the command's.
    WrongFence,
    /// `token twice`: the buffers are given back twice.
    Twice,
    /// `bad descriptor id` or `bad descriptor id 70000`: other buffers are given back.
    BadId(Option<u32>),
    /// `open chain`: the chain of descriptors goes on when it is given back.
    OpenChain,
    /// `garbage` or `garbage from 32`: random bytes from there on, or after the answer's header.
    Garbage(Option<usize>),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Error(kind) => write!(f, "error {kind:#x}"),
            Action::NoAnswer => write!(f, "no answer"),
            Action::Late(delay) => write!(f, "answer after {} ms", delay.as_millis()),
            Action::WrongType(None) => write!(f, "wrong type"),
            Action::WrongType(Some(kind)) => write!(f, "wrong type {kind:#x}"),
            Action::UsedLength(length) => write!(f, "used length {length}"),
            Action::WrongFence => write!(f, "wrong fence id"),
            Action::Twice => write!(f, "token twice"),
            Action::BadId(None) => write!(f, "bad descriptor id"),
            Action::BadId(Some(id)) => write!(f, "bad descriptor id {id}"),
            Action::OpenChain => write!(f, "open chain"),
            Action::Garbage(None) => write!(f, "garbage"),
            Action::Garbage(Some(from)) => write!(f, "garbage from {from}"),
        }
    }
}

/// A number, decimal or with `0x`.
pub fn number(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .map_err(|_| format!("`{text}` is no number"))
}

/// A number of 32 bits, decimal or with `0x`.
pub fn number32(text: &str) -> Result<u32, String> {
    u32::try_from(number(text)?).map_err(|_| format!("`{text}` does not fit 32 bits"))
}

/// A time: `2 s`, `300 ms`, `300ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let unit = text
        .find(|c: char| !c.is_ascii_digit())
        .ok_or_else(|| format!("`{text}` has no unit: s or ms"))?;
    let value = number(&text[..unit])?;
    match text[unit..].trim() {
        "s" => Ok(Duration::from_secs(value)),
        "ms" => Ok(Duration::from_millis(value)),
        other => Err(format!("`{other}` is no unit: s or ms")),
    }
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match &words[..] {
            ["error", kind] => number32(kind).map(Action::Error),
            ["no", "answer"] => Ok(Action::NoAnswer),
            ["answer", "after", time @ ..] if !time.is_empty() => {
                duration(&time.concat()).map(Action::Late)
            }
            ["wrong", "type"] => Ok(Action::WrongType(None)),
            ["wrong", "type", kind] => number32(kind).map(|kind| Action::WrongType(Some(kind))),
            ["used", "length", length] => number32(length).map(Action::UsedLength),
            ["wrong", "fence", "id"] => Ok(Action::WrongFence),
            ["token", "twice"] => Ok(Action::Twice),
            ["bad", "descriptor", "id"] => Ok(Action::BadId(None)),
            ["bad", "descriptor", "id", id] => number32(id).map(|id| Action::BadId(Some(id))),
            ["open", "chain"] => Ok(Action::OpenChain),
            ["garbage"] => Ok(Action::Garbage(None)),
            ["garbage", "from", from] => {
                number32(from).map(|from| Action::Garbage(Some(from as usize)))
            }
            _ => Err(format!("`{text}` is no fault")),
        }
    }
}

/// Which commands a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Any,
    Fenced,
    Kind(u32),
}

/// When, what, how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    which: Which,
    /// The first command that the rule strikes, counted from 1.
    first: u64,
    /// The last one.
    last: u64,
    action: Action,
    /// The commands so far.
    seen: u64,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (when, action) = text
            .split_once(':')
            .ok_or_else(|| format!("`{text}` is not `WHEN COMMAND: ACTION`"))?;
        let ordinal = |text: &str| -> Result<u64, String> {
            let digits = text.trim_end_matches(|c: char| c.is_ascii_lowercase());
            match &text[digits.len()..] {
                "st" | "nd" | "rd" | "th" => number(digits),
                _ => Err(format!("`{text}` is not `1st`, `2nd` and so on")),
            }
        };
        let words: Vec<&str> = when.split_whitespace().filter(|&w| w != "the").collect();
        let (first, last, name) = match &words[..] {
            [name] | ["every", name] => (1, u64::MAX, name),
            ["from", first, name] => (ordinal(first)?, u64::MAX, name),
            [only, name] => (ordinal(only)?, ordinal(only)?, name),
            _ => return Err(format!("`{when}` is not `WHEN COMMAND`")),
        };
        let which = match *name {
            "any" => Which::Any,
            "fenced" => Which::Fenced,
            name => Which::Kind(
                Command::kind_of(name).ok_or_else(|| format!("`{name}` is no command"))?,
            ),
        };
        Ok(Self {
            which,
            first,
            last,
            action: action.parse()?,
            seen: 0,
        })
    }
}

/// A small generator of pseudo-random numbers (splitmix64): the same seed, the same faults.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

/// Random faults: a seed, and how many of a thousand commands are struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomFaults {
    /// The seed.
    pub seed: u64,
    /// Of a thousand.
    pub rate: u64,
}

impl FromStr for RandomFaults {
    type Err = String;

    /// `SEED` or `SEED:RATE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (seed, rate) = text.split_once(':').unwrap_or((text, "20"));
        Ok(Self {
            seed: number(seed)?,
            rate: number(rate)?,
        })
    }
}

/// All rules, and the random faults.
#[derive(Debug)]
pub struct Faults {
    rules: Vec<Rule>,
    rate: u64,
    random: Random,
}

impl Faults {
    /// Starts with `rules`, and with random faults if any are wanted.
    pub fn new(rules: Vec<Rule>, random: Option<RandomFaults>) -> Self {
        let mut faults = Self {
            rules,
            rate: 0,
            random: Random::new(0),
        };
        faults.randomise(random);
        faults
    }

    /// Adds a rule.
    pub fn add(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// Starts or stops random faults.
    pub fn randomise(&mut self, random: Option<RandomFaults>) {
        self.rate = random.map_or(0, |random| random.rate);
        self.random = Random::new(random.map_or(0, |random| random.seed));
    }

    /// Forgets every rule, and stops random faults.
    pub fn clear(&mut self) {
        self.rules.clear();
        self.rate = 0;
    }

    /// The generator, for what a fault has to invent.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// What goes wrong with this command. The first rule that strikes is the one.
    pub fn strike(&mut self, kind: u32, fenced: bool) -> Option<Action> {
        let mut struck = None;
        for rule in &mut self.rules {
            let about = match rule.which {
                Which::Any => true,
                Which::Fenced => fenced,
                Which::Kind(which) => which == kind,
            };
            if about {
                rule.seen += 1;
                if struck.is_none() && (rule.first..=rule.last).contains(&rule.seen) {
                    struck = Some(rule.action);
                }
            }
        }
        if struck.is_none() && self.rate > 0 && self.random.below(1000) < self.rate {
            struck = Some(self.invent());
        }
        struck
    }

    fn invent(&mut self) -> Action {
        let random = &mut self.random;
        match random.below(10) {
            0 => Action::Error(ResponseType::ErrUnspec as u32 + random.below(6) as u32),
            1 => Action::NoAnswer,
            2 => Action::Late(Duration::from_millis(random.below(3000))),
            3 => Action::WrongType(Some(0x1100 + random.below(8) as u32)),
            4 => Action::UsedLength(random.below(1100) as u32),
            5 => Action::WrongFence,
            6 => Action::Twice,
            7 => Action::BadId(None),
            8 => Action::OpenChain,
            _ => Action::Garbage(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_the_readme() {
        for (text, action) in [
            ("error 0x1203", Action::Error(0x1203)),
            ("no answer", Action::NoAnswer),
            ("answer after 2 s", Action::Late(Duration::from_secs(2))),
            ("answer after 30ms", Action::Late(Duration::from_millis(30))),
            ("wrong type", Action::WrongType(None)),
            ("wrong type 0x1104", Action::WrongType(Some(0x1104))),
            ("used length 3", Action::UsedLength(3)),
            ("wrong fence id", Action::WrongFence),
            ("token twice", Action::Twice),
            ("bad descriptor id", Action::BadId(None)),
            ("bad descriptor id 70000", Action::BadId(Some(70000))),
            ("garbage", Action::Garbage(None)),
            ("garbage from 32", Action::Garbage(Some(32))),
        ] {
            let rule: Rule = format!("the 3rd TRANSFER_TO_HOST_2D: {text}")
                .parse()
                .unwrap();
            assert_eq!(rule.action, action);
            assert_eq!((rule.first, rule.last), (3, 3));
            assert_eq!(rule.which, Which::Kind(0x105));
            assert_eq!(action.to_string().parse::<Action>().unwrap(), action);
        }
        for bad in [
            "",
            "GET_EDID",
            "GET_EDID: be nice",
            "3 GET_EDID: garbage",
            "GET_LOST: garbage",
            "GET_EDID: answer after 3",
            "GET_EDID: answer after",
        ] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rule_strikes_when_it_says() {
        let mut faults = Faults::new(
            vec![
                "2nd GET_EDID: no answer".parse().unwrap(),
                "from 3rd any: garbage".parse().unwrap(),
                "fenced: token twice".parse().unwrap(),
            ],
            None,
        );
        assert_eq!(faults.strike(0x10a, false), None);
        assert_eq!(faults.strike(0x10a, true), Some(Action::NoAnswer));
        assert_eq!(faults.strike(0x10a, true), Some(Action::Garbage(None)));
        faults.clear();
        assert_eq!(faults.strike(0x10a, true), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let strikes = |seed: &str| -> Vec<_> {
            let mut faults = Faults::new(Vec::new(), Some(seed.parse().unwrap()));
            (0..1000).map(|_| faults.strike(0x100, false)).collect()
        };
        assert_eq!(strikes("7:100"), strikes("7:100"));
        assert_ne!(strikes("7:100"), strikes("8:100"));
        let struck = strikes("7:100").iter().flatten().count();
        assert!((50..200).contains(&struck), "{struck}");
    }
}
