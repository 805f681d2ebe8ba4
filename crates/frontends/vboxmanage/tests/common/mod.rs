//! Runs `VBoxManage` with a configuration directory of its own.

// Each test program uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A scratch directory with a configuration directory and a machine folder in it. Ends its processes and removes
/// itself when it goes.
pub struct Home {
    pub dir: PathBuf,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{self:?}");
        self.stdout
    }

    /// Standard error of a command that must have failed with `status`.
    #[track_caller]
    pub fn fails(self, status: i32) -> String {
        assert_eq!(self.status, status, "{self:?}");
        self.stderr
    }
}

/// A process of a [`Home`].
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    /// The name of the program, as the kernel has it (at most 15 characters).
    pub name: String,
    pub arguments: Vec<String>,
}

/// The directory with the programs under test.
pub fn programs() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_VBoxManage"));
    program.parent().map(Path::to_owned).unwrap_or_default()
}

impl Home {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(
            programs().join("VBoxSVC").is_file(),
            "VBoxSVC is not built: run `cargo build -p vboxsvc` (a build of the workspace does it)"
        );
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("boxwood-cli-{}-{number}", std::process::id()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.join("vms")).unwrap();
        let home = Self { dir };
        home.run(["setproperty", "machinefolder", home.path("vms").to_str().unwrap()]).ok();
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_VBoxManage"));
        command
            .args(words)
            .current_dir(&self.dir)
            .env("VBOX_USER_HOME", self.path("config"))
            .env("XDG_RUNTIME_DIR", &self.dir)
            .env_remove("DISPLAY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn spawn<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Child {
        self.command(words).spawn().unwrap()
    }

    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, words: I) -> Ran {
        finish(self.spawn(words))
    }

    /// Runs a command line whose words are separated by spaces.
    pub fn manage(&self, line: &str) -> Ran {
        self.run(line.split(' '))
    }

    /// Every process that has this configuration directory in its environment.
    pub fn processes(&self) -> Vec<Process> {
        let wanted = format!("VBOX_USER_HOME={}", self.path("config").display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
            if !read("environ").split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes()) {
                continue;
            }
            let name = String::from_utf8_lossy(&read("comm")).trim().to_owned();
            let arguments = read("cmdline");
            let arguments =
                arguments.split(|byte| *byte == 0).map(|a| String::from_utf8_lossy(a).into_owned());
            found.push(Process { pid, name, arguments: arguments.collect() });
        }
        found
    }

    /// Ends processes of this home without notice.
    pub fn kill(&self, process: &Process) {
        if let Some(pid) = rustix::process::Pid::from_raw(process.pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// The value of a key of `showvminfo --machinereadable`, without its quotes.
    pub fn value(&self, vm: &str, key: &str) -> Option<String> {
        let text = self.run(["showvminfo", vm, "--machinereadable"]).ok();
        value(&text, key)
    }
}

/// The value of `key` in machine-readable output.
pub fn value(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix('=')?;
        Some(value.trim_matches('"').to_owned())
    })
}

/// Waits for a command's end, and ends it if it takes for ever.
#[track_caller]
pub fn finish(mut child: Child) -> Ran {
    const LIMIT: Duration = Duration::from_secs(60);
    let end = Instant::now() + LIMIT;
    let reader = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = reader(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = reader(child.stderr.take().map(|stream| Box::new(stream) as _));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() >= end {
            let _ = child.kill();
            panic!("a command has not ended after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Ran {
        status: status.code().unwrap_or(-1),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    }
}

/// Waits until `done`, but not for ever.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for process in self.processes() {
            self.kill(&process);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}
