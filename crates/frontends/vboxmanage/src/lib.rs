//! `VBoxManage`: the command line of the Main API, with VirtualBox 7.0's grammar and output.
//!
//! A command goes through three steps that know nothing of each other: [`parse`] makes a typed [`parse::Request`] of
//! the words and touches nothing; [`exec`] carries it out through `main_api` and gathers what is to be shown as plain
//! data; [`print`] turns that data into text. Standard output carries data only; errors and the progress bar go to
//! standard error, which stays empty otherwise, since clients take anything there for a failure.
//!
//! Exit status: 0 for success, 1 for a command that failed, 2 for a command line that is not understood.

use std::ffi::OsString;
use std::process::ExitCode;

mod exec;
pub mod getopt;
pub mod global;
pub mod help;
pub mod parse;
pub mod print;
pub mod scancode;
pub mod usage;

use global::{Global, Outcome};
use parse::Command;
use print::error::Stderr;
use usage::UsageError;

const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;
const SYNTAX: u8 = 2;

/// Runs the command line `words` (without the program's name).
pub fn main(words: Vec<OsString>) -> ExitCode {
    ExitCode::from(run(words))
}

fn run(words: Vec<OsString>) -> u8 {
    let mut stderr = Stderr::default();
    let mut utf8 = Vec::with_capacity(words.len());
    for word in words {
        match word.into_string() {
            Ok(word) => utf8.push(word),
            Err(word) => {
                stderr.error(&format!("The argument '{}' is not valid UTF-8", word.to_string_lossy()));
                return SYNTAX;
            }
        }
    }
    let global = match global::parse(utf8, &mut |path| std::fs::read(path)) {
        Ok(Outcome::Run(global)) => global,
        Ok(Outcome::Version) => {
            return print::stdout(&format!("{}\n", print::version()));
        }
        Ok(Outcome::BuildType) => return print::stdout("release\n"),
        Ok(Outcome::Usage { logo }) => {
            let logo = if logo { print::logo() } else { String::new() };
            return print::stdout(&format!("{logo}{}", help::overview()));
        }
        Err(error) => {
            stderr.error(&error);
            return FAILURE;
        }
    };
    command(&global, &mut stderr)
}

fn command(global: &Global, stderr: &mut Stderr) -> u8 {
    let Some((name, words)) = global.words.split_first() else {
        return print::stdout(&help::overview());
    };
    let Some(command) = parse::find_command(name) else {
        if name == "commands" {
            return print::stdout(&help::command_names());
        }
        stderr.logo();
        stderr.syntax(&format!("Invalid command '{name}'"), &help::overview());
        return SYNTAX;
    };
    if global.help {
        return print::stdout(&format!("{}{}", print::logo(), help::full(command.topic)));
    }
    let Some(parse) = command.parse else {
        stderr.error(&format!("The command '{name}' is not available in this version of {}", print::PRODUCT));
        return FAILURE;
    };
    if words.is_empty() {
        // As VirtualBox: no words at all show the synopsis as an answer, and fail.
        print::stdout(&help::usage(command.topic));
        return FAILURE;
    }
    match parse(words) {
        Ok(request) => exec::run(request, global, stderr),
        Err(error) => refuse(command, error, stderr),
    }
}

/// Tells why a command line was not understood.
fn refuse(command: &Command, error: UsageError, stderr: &mut Stderr) -> u8 {
    match error {
        UsageError::Help => print::stdout(&help::full(command.topic)),
        UsageError::Syntax(text) => {
            stderr.logo();
            stderr.syntax(&text, &help::usage(command.topic));
            SYNTAX
        }
        UsageError::Argument(text) => {
            stderr.error(&text);
            SYNTAX
        }
        UsageError::Failure(text) => {
            stderr.error(&text);
            FAILURE
        }
    }
}
