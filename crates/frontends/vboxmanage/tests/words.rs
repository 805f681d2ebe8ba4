//! What the program says to a command line before it needs the service.

use std::process::{Command, Stdio};

fn run(words: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_VBoxManage"))
        .args(words)
        // There is nothing to connect to there, and nothing may try.
        .env("VBOX_USER_HOME", "/proc/no/such/directory")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn the_version_stands_alone() {
    for word in ["--version", "-v", "-V"] {
        assert_eq!(run(&[word]), (0, "7.0.20r163906\n".into(), String::new()));
    }
}

#[test]
fn no_words_print_the_usage_and_succeed() {
    let (status, stdout, stderr) = run(&[]);
    assert_eq!((status, stderr.as_str()), (0, ""));
    assert!(stdout.contains("Command Line Management Interface Version 7.0.20\n"), "{stdout}");
    assert!(stdout.contains("VBoxManage createvm <--name=name>"), "{stdout}");
    let (status, quiet, _) = run(&["-q"]);
    assert_eq!(status, 0);
    assert!(stdout.ends_with(&quiet) && quiet.starts_with("Usage"), "{quiet}");
}

#[test]
fn a_bad_command_line_has_status_2_and_shows_the_synopsis() {
    for (words, error) in [
        (&["frobnicate"][..], "Invalid command 'frobnicate'"),
        (&["createvm", "--frob"], "Unknown option: --frob"),
        (&["createvm", "--register"], "Parameter --name is required"),
        (&["modifyvm", "x", "--frob", "1"], "Unknown option: --frob"),
        (&["modifyvm", "x", "--memory", "lots"], "Invalid argument format: lots"),
        (&["modifyvm", "x"], "Not enough parameters"),
        (&["list", "frobs"], "Unknown subcommand \"frobs\"."),
        (&["storagectl", "x", "--name", "y"], "Too few parameters"),
        (&["controlvm", "x", "dance"], "Invalid parameter 'dance'"),
        (&["createmedium", "--size", "1"], "Parameter --filename is required"),
    ] {
        let (status, stdout, stderr) = run(words);
        assert_eq!((status, stdout.as_str()), (2, ""), "{words:?}");
        assert!(stderr.contains(&format!("VBoxManage: error: {error}\n")), "{words:?}: {stderr}");
        assert!(stderr.contains("\nUsage"), "{words:?}: {stderr}");
        let last = stderr.trim_end().lines().last().unwrap();
        if words[0] == "modifyvm" {
            // The synopsis is long, so that the error is repeated below it.
            assert_eq!(last, format!("VBoxManage: error: {error}"));
        }
    }
}

#[test]
fn a_bad_value_shows_no_synopsis() {
    let (status, stdout, stderr) = run(&["modifyvm", "x", "--firmware", "uefi"]);
    assert_eq!(status, 1);
    assert_eq!(stdout, "");
    assert_eq!(stderr, "VBoxManage: error: Invalid --firmware argument 'uefi'\n");
    let (status, _, stderr) = run(&["createmedium", "--filename", "x", "--variant", "soft"]);
    assert_eq!((status, stderr.as_str()), (2, "VBoxManage: error: Invalid medium variant 'soft'\n"));
}

#[test]
fn a_command_without_words_shows_its_synopsis() {
    let (status, stdout, stderr) = run(&["createvm"]);
    assert_eq!((status, stderr.as_str()), (1, ""));
    assert!(stdout.starts_with("Usage - Create a new virtual machine:\n"), "{stdout}");
}

#[test]
fn help_is_an_answer() {
    for words in [&["help", "startvm"][..], &["startvm", "--help"], &["modifyvm", "--help"]] {
        let (status, stdout, stderr) = run(words);
        assert_eq!((status, stderr.as_str()), (0, ""), "{words:?}");
        assert!(stdout.contains("Usage - "), "{words:?}: {stdout}");
    }
}

#[test]
fn a_command_that_is_not_there_yet_says_so() {
    let (status, stdout, stderr) = run(&["movevm", "x"]);
    assert_eq!((status, stdout.as_str()), (1, ""));
    assert_eq!(
        stderr,
        "VBoxManage: error: The command 'movevm' is not available in this version of Boxwood\n"
    );
}

#[test]
fn a_service_that_cannot_be_reached_is_status_1() {
    let (status, stdout, stderr) = run(&["list", "vms"]);
    assert_eq!((status, stdout.as_str()), (1, ""));
    assert!(stderr.starts_with("VBoxManage: error: Failed to create the VirtualBox object!\n"), "{stderr}");
}
