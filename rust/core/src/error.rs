//! What may go wrong that is not a packet's fault.

use std::borrow::Cow;
use std::fmt;

/// Shared memory says what no process of ours writes: `errors.RingError` in Python, with the same fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    /// Which memory, as in `shared memory 'ring data seal'`.
    pub memory: String,
    /// What of it.
    pub field: Cow<'static, str>,
    /// What it says.
    pub value: String,
    /// What it should say.
    pub expected: String,
}

/// Why a part can go on no longer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `RingError` in Python.
    Contradiction(Contradiction),
    /// An error number of a descriptor that is lost: `OSError` in Python.
    Lost(i32),
    /// The kernel refused what only an attaching process asks for: `SystemCallError` in Python.
    Refused(String),
}

impl Fault {
    /// Say which memory contradicts us, and how.
    pub fn contradiction(
        memory: &str,
        field: impl Into<Cow<'static, str>>,
        value: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self::Contradiction(Contradiction {
            memory: format!("shared memory '{memory}'"),
            field: field.into(),
            value: value.to_string(),
            expected: expected.to_string(),
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Contradiction(it) => {
                write!(
                    out,
                    "{}: {} is {}, expected {}",
                    it.memory, it.field, it.value, it.expected
                )
            }
            Self::Lost(number) => write!(out, "descriptor lost (error {number})"),
            Self::Refused(why) => out.write_str(why),
        }
    }
}

impl std::error::Error for Fault {}

/// Nothing but a `Fault` ends a part.
pub type Result<T> = std::result::Result<T, Fault>;
