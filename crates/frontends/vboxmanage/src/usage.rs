//! Errors found on the command line, before any object is touched.

use crate::getopt::GetOptError;

/// A command line that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageError {
    /// Not the command's grammar: text and synopsis are printed; exit status 2.
    Syntax(String),
    /// A word that the option does not know: only the text is printed; exit status 2.
    Argument(String),
    /// As [`UsageError::Argument`], where VirtualBox ends with exit status 1.
    Failure(String),
    /// The user asked for help; exit status 0.
    Help,
}

pub type Parsed<T> = Result<T, UsageError>;

impl UsageError {
    pub fn syntax(text: impl Into<String>) -> Self {
        Self::Syntax(text.into())
    }

    pub fn argument(text: impl Into<String>) -> Self {
        Self::Argument(text.into())
    }

    pub fn failure(text: impl Into<String>) -> Self {
        Self::Failure(text.into())
    }

    /// What a word means that no position is left for.
    pub fn invalid_parameter(word: &str) -> Self {
        Self::Syntax(format!("Invalid parameter '{word}'"))
    }
}

impl From<GetOptError> for UsageError {
    fn from(error: GetOptError) -> Self {
        match error {
            GetOptError::HelpWanted => Self::Help,
            other => Self::Syntax(other.to_string()),
        }
    }
}
