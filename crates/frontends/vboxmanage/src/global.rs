//! What comes before the command: global options and response files.

use std::io;

/// A command line after its global options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Global {
    /// The command and its words.
    pub words: Vec<String>,
    /// `help COMMAND`, or `--help` before it.
    pub help: bool,
    pub detailed_progress: bool,
    /// The password of the settings, where one was given.
    pub settings_password: Option<SettingsPassword>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingsPassword {
    Text(String),
    File(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Run(Global),
    Version,
    BuildType,
    Usage { logo: bool },
}

/// Parses the words of the command line. `read` reads a response file.
pub fn parse(
    mut words: Vec<String>,
    read: &mut dyn FnMut(&str) -> io::Result<Vec<u8>>,
) -> Result<Outcome, String> {
    let mut global = Global::default();
    let mut logo = true;
    let mut response_file = false;
    let mut at = 0;
    while let Some(word) = words.get(at).cloned() {
        at += 1;
        match word.as_str() {
            "help" | "--help" | "-help" | "-h" | "-?" => {
                if at == words.len() {
                    return Ok(Outcome::Usage { logo });
                }
                global.help = true;
            }
            "-V" | "--version" | "-v" | "-version" | "-Version" => return Ok(Outcome::Version),
            "--dump-build-type" => return Ok(Outcome::BuildType),
            "--dumpopts" | "-dumpopts" => return Ok(Outcome::Usage { logo: false }),
            "--nologo" | "-nologo" | "-q" => logo = false,
            "-d" | "--detailed-progress" => global.detailed_progress = true,
            "--settingspw" | "-settingspw" => {
                let password = words.get(at).cloned().ok_or("Password expected")?;
                global.settings_password = Some(SettingsPassword::Text(password));
                at += 1;
            }
            "--settingspwfile" | "-settingspwfile" => {
                let file = words.get(at).cloned().ok_or("No password file specified")?;
                global.settings_password = Some(SettingsPassword::File(file));
                at += 1;
            }
            _ if word.starts_with('@') => {
                if response_file {
                    return Err("Only one response file allowed".to_owned());
                }
                response_file = true;
                let name = &word[1..];
                let bytes =
                    read(name).map_err(|error| format!("Error reading response file '{name}': {error}"))?;
                let text = String::from_utf8(bytes).map_err(|error| {
                    format!("Invalid response file ('{name}') encoding: {}", error.utf8_error())
                })?;
                let more = split(&text).map_err(|error| {
                    format!("Failed to parse response file '{name}' (bourne shell style): {error}")
                })?;
                words.splice(at..at, more);
            }
            _ => {
                global.words = words.split_off(at - 1);
                return Ok(Outcome::Run(global));
            }
        }
    }
    Ok(Outcome::Usage { logo })
}

/// Splits text into words as a Bourne shell does, without expansions.
fn split(text: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => word.push(c),
                        None => return Err("unbalanced quotes"),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('"') => break,
                        Some('\\') => match chars.next() {
                            Some(c @ ('"' | '\\' | '$' | '`')) => word.push(c),
                            Some('\n') => {}
                            Some(c) => word.extend(['\\', c]),
                            None => return Err("unbalanced quotes"),
                        },
                        Some(c) => word.push(c),
                        None => return Err("unbalanced quotes"),
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => {}
                Some(c) => word.get_or_insert_default().push(c),
                None => return Err("trailing backslash"),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &[&str]) -> Outcome {
        parse_words(line).unwrap()
    }

    fn parse_words(line: &[&str]) -> Result<Outcome, String> {
        let words = line.iter().map(|word| (*word).to_owned()).collect();
        parse(words, &mut |name| match name {
            "args" => Ok(b"--name 'a b' \"c \\\"d\\\"\" e\\ f\n --register".to_vec()),
            "latin" => Ok(vec![0xe4]),
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        })
    }

    fn words(outcome: Outcome) -> Vec<String> {
        match outcome {
            Outcome::Run(global) => global.words,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn global_options_stand_before_the_command() {
        for first in ["-nologo", "--nologo", "-q", "-d"] {
            assert_eq!(words(run(&[first, "list", "vms", "-q"])), ["list", "vms", "-q"], "{first}");
        }
        let Outcome::Run(global) = run(&["--settingspw", "x", "-q", "list"]) else { panic!() };
        assert_eq!(global.settings_password, Some(SettingsPassword::Text("x".into())));
        assert_eq!(parse_words(&["--settingspwfile"]), Err("No password file specified".into()));
    }

    #[test]
    fn no_command_shows_the_usage() {
        assert_eq!(run(&[]), Outcome::Usage { logo: true });
        assert_eq!(run(&["-q"]), Outcome::Usage { logo: false });
        assert_eq!(run(&["help"]), Outcome::Usage { logo: true });
        let Outcome::Run(global) = run(&["help", "list"]) else { panic!() };
        assert!(global.help);
        assert_eq!(global.words, ["list"]);
    }

    #[test]
    fn the_version_wins_over_everything_after_it() {
        for word in ["-v", "-V", "--version", "-version"] {
            assert_eq!(run(&[word, "list"]), Outcome::Version);
        }
    }

    #[test]
    fn a_response_file_is_split_as_a_shell_would() {
        let expected = ["createvm", "--name", "a b", "c \"d\"", "e f", "--register"];
        let outcome = run(&["createvm", "@args"]);
        assert_eq!(words(outcome), ["createvm", "@args"], "only before the command");
        assert_eq!(words(run(&["@args"])), ["--name", "a b", "c \"d\"", "e f", "--register"]);
        assert_eq!(split("createvm --name 'a b' \"c \\\"d\\\"\" e\\ f --register").unwrap(), expected);
        assert!(parse_words(&["@nope", "x"]).unwrap_err().starts_with("Error reading response file 'nope'"));
        assert!(parse_words(&["@latin", "x"]).unwrap_err().contains("encoding"));
        assert_eq!(split("'a"), Err("unbalanced quotes"));
    }
}
