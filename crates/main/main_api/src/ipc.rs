//! How a client finds the service, and how there is one service per configuration directory.
//!
//! - The service holds an exclusive `flock` on `VBoxSVC.lock` in the configuration directory for as long as it lives. The
//!   file's content is one line: the path of its socket. A lock dies with its holder, so that a killed service leaves at
//!   worst a line that leads to no one.
//! - The socket lies in a directory of mode 0700 that belongs to the user: `$XDG_RUNTIME_DIR/boxwood-ipc` or
//!   `/tmp/.boxwood-<uid>-ipc`, followed by `-<VBOX_IPC_SOCKETID>` if that is set. Its name is derived from the
//!   configuration directory. Clients take the path from the lock file, so that it does not matter if theirs would differ.
//! - Both ends check the other's user by `SO_PEERCRED`.
//! - A client that finds no service takes an exclusive `flock` on the configuration directory itself, looks again, and
//!   starts `VBoxSVC` while it holds that lock. Of clients that race, one starts the service; the others find it.
//! - `VBoxSVC` tells on its standard output, which is a pipe to the client, when it serves (`ready`) or why it cannot
//!   (`error: …`). No one polls.
//! - A service that is about to exit removes its socket first and may drop a connection that came in at that moment; no
//!   call on it has been answered then, and the client begins anew.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use vbox_types::ResultCode;

use crate::error::{ApiError, ApiResult};

/// Name of the lock file in the configuration directory.
pub const LOCK_FILE: &str = "VBoxSVC.lock";
/// The option with which clients start the service.
pub const AUTO_SHUTDOWN: &str = "--auto-shutdown";
/// The line by which a started service tells that it can be reached.
pub const READY: &str = "ready";

/// How long a client tries to reach a service before it gives up.
const START_LIMIT: Duration = Duration::from_secs(30);

/// The user's configuration directory.
pub fn config_dir() -> ApiResult<PathBuf> {
    settings::Environment::of_process().config_directory().map_err(|e| ApiError::fail(e.to_string()))
}

fn file_error(what: &str, path: &Path, error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ResultCode::FileError, format!("{what} '{}' ({error})", path.display()))
}

/// Whether a peer with these credentials may use a service of user `own_uid`: only the user itself, not even root.
pub fn peer_allowed(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid
}

/// Refuses a stream whose other end belongs to another user.
pub fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    let own = rustix::process::geteuid().as_raw();
    if peer_allowed(credentials.uid.as_raw(), own) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("peer has uid {}", credentials.uid.as_raw())))
}

/// Connects to the service of `config_dir` if one runs.
pub(crate) fn connect_running(config_dir: &Path) -> Option<UnixStream> {
    let mut line = String::new();
    // A path is at most 108 bytes; whatever else is in the file is no line of ours.
    File::open(config_dir.join(LOCK_FILE)).ok()?.take(512).read_to_string(&mut line).ok()?;
    let path = line.strip_suffix('\n')?;
    let stream = UnixStream::connect(path).ok()?;
    check_peer(&stream).ok()?;
    Some(stream)
}

/// Connects to the service of `config_dir`, starting it if none runs, and has `handshake` make a client of the stream.
pub(crate) fn connect_or_start<T>(
    config_dir: &Path,
    handshake: impl Fn(UnixStream) -> ApiResult<T>,
) -> ApiResult<T> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if let Some(stream) = connect_running(config_dir)
            && let Ok(client) = handshake(stream)
        {
            return Ok(client);
        }
        let starting = lock_for_start(config_dir)?;
        // Another client may have started it while we waited for the lock.
        let last = match connect_running(config_dir).map(&handshake) {
            Some(Ok(client)) => return Ok(client),
            Some(Err(error)) => Some(error),
            None => {
                start(config_dir)?;
                None
            }
        };
        drop(starting);
        if Instant::now() >= deadline {
            return Err(last.unwrap_or_else(|| ApiError::fail("VBoxSVC was started but cannot be reached")));
        }
    }
}

/// Takes the lock under which clients start the service.
fn lock_for_start(config_dir: &Path) -> ApiResult<File> {
    make_config_dir(config_dir)?;
    let dir =
        File::open(config_dir).map_err(|e| file_error("Could not open the directory", config_dir, &e))?;
    flock(&dir, FlockOperation::LockExclusive)
        .map_err(|e| file_error("Could not lock the directory", config_dir, &e))?;
    Ok(dir)
}

fn make_config_dir(config_dir: &Path) -> ApiResult<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(config_dir)
        .map_err(|e| file_error("Could not create the directory", config_dir, &e))
}

/// `VBoxSVC` and its kind: beside this program, else in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = beside.into_iter().chain(std::env::split_paths(&path).map(|dir| dir.join(name)));
    candidates
        .find(|file| fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// Starts the service and waits until it can be reached.
fn start(config_dir: &Path) -> ApiResult<()> {
    let program = find_program("VBoxSVC").ok_or_else(|| {
        ApiError::fail("Cannot start VBoxSVC: the program is neither beside this one nor in PATH")
    })?;
    let mut child = Command::new(&program)
        .arg(AUTO_SHUTDOWN)
        .env("VBOX_USER_HOME", config_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| file_error("Cannot start", &program, &e))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // The service closes its end after the first line, or by dying.
        let _ = BufReader::new(stdout.take(4096)).read_line(&mut line);
    }
    match line.trim_end() {
        READY => Ok(()),
        "" => {
            let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
            Err(ApiError::fail(format!("VBoxSVC did not start ({status})")))
        }
        problem => {
            let _ = child.wait();
            Err(ApiError::fail(format!("VBoxSVC did not start: {}", problem.trim_start_matches("error: "))))
        }
    }
}

/// The service's end: its lock and its listening socket.
pub struct ServiceEndpoint {
    lock: File,
    listener: UnixListener,
    socket: PathBuf,
}

impl ServiceEndpoint {
    /// Becomes the service of `config_dir`. `None` if another service is and can be reached.
    pub fn claim(config_dir: &Path) -> ApiResult<Option<Self>> {
        make_config_dir(config_dir)?;
        let path = config_dir.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| file_error("Could not open", &path, &e))?;
        if !lock_unless_served(&lock, config_dir).map_err(|e| file_error("Could not lock", &path, &e))? {
            return Ok(None);
        }
        let socket = socket_path(config_dir)?;
        // Whoever left this socket behind is dead: the lock is ours.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .map_err(|e| file_error("Could not create the socket", &socket, &e))?;
        let mut endpoint = Self { lock, listener, socket };
        let line = format!("{}\n", endpoint.socket.display());
        endpoint.announce(&line).map_err(|e| file_error("Could not write", &path, &e))?;
        Ok(Some(endpoint))
    }

    fn announce(&mut self, line: &str) -> io::Result<()> {
        self.lock.seek(SeekFrom::Start(0))?;
        self.lock.set_len(0)?;
        self.lock.write_all(line.as_bytes())
    }

    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Stops being reachable; the lock goes with the process. Connections that are in the queue are returned, so that
    /// the caller may decide to live on for them ([`Self::reopen`]).
    pub fn withdraw(&mut self) -> io::Result<Vec<UnixStream>> {
        self.lock.set_len(0)?;
        let _ = fs::remove_file(&self.socket);
        self.listener.set_nonblocking(true)?;
        let mut late = Vec::new();
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(false)?;
            late.push(stream);
        }
        Ok(late)
    }

    /// Becomes reachable again after [`Self::withdraw`].
    pub fn reopen(&mut self) -> io::Result<()> {
        self.listener = UnixListener::bind(&self.socket)?;
        let line = format!("{}\n", self.socket.display());
        self.announce(&line)
    }
}

/// Takes the service's lock. While another process has it, that one may be ending: waits until the lock is free, or
/// until the other can be reached (`false`).
fn lock_unless_served(lock: &File, config_dir: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        if connect_running(config_dir).is_some() {
            return Ok(false);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "another VBoxSVC holds it and does not answer",
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Where the process of a network of `config_dir`'s user is reached.
pub fn network_socket(config_dir: &Path, network: &str) -> ApiResult<PathBuf> {
    let service = socket_path(config_dir)?;
    // FNV-1a: programs of another build must come to the same name.
    let hash = network.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut name = service.file_name().unwrap_or_default().to_owned();
    name.push(format!("-net-{hash:016x}"));
    Ok(service.with_file_name(name))
}

/// Where the socket of `config_dir`'s service is made. Makes the directory for it.
fn socket_path(config_dir: &Path) -> ApiResult<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let suffix = match std::env::var("VBOX_IPC_SOCKETID") {
        Ok(id) if !id.is_empty() => {
            let id: String =
                id.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(24).collect();
            format!("-{id}")
        }
        _ => String::new(),
    };
    let name = format!("svc-{:016x}", identity(config_dir));
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|dir| dir.is_absolute() && private_dir(dir, uid).is_ok());
    if let Some(dir) = runtime.map(|dir| dir.join(format!("boxwood-ipc{suffix}"))) {
        let socket = dir.join(&name);
        // sun_path holds 108 bytes with the terminating NUL.
        if socket.as_os_str().len() < 108 && make_private_dir(&dir, uid).is_ok() {
            return Ok(socket);
        }
    }
    let dir = PathBuf::from(format!("/tmp/.boxwood-{uid}-ipc{suffix}"));
    make_private_dir(&dir, uid).map_err(|e| file_error("Could not use the directory", &dir, &e))?;
    Ok(dir.join(name))
}

/// A number that stands for the directory itself, by whatever name it is reached.
fn identity(config_dir: &Path) -> u64 {
    // Only the service computes this, and only to keep sockets apart: any hash will do.
    let mut hasher = std::hash::DefaultHasher::new();
    match fs::metadata(config_dir) {
        Ok(meta) => {
            hasher.write_u64(meta.dev());
            hasher.write_u64(meta.ino());
        }
        Err(_) => hasher.write(config_dir.as_os_str().as_encoded_bytes()),
    }
    hasher.finish()
}

fn make_private_dir(dir: &Path, uid: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => private_dir(dir, uid),
        other => other,
    }
}

/// Accepts a directory (no symbolic link) that belongs to the user and that no one else may enter.
fn private_dir(dir: &Path, uid: u32) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    if meta.is_dir() && meta.uid() == uid && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is not a private directory of this user"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_user_is_allowed() {
        assert!(peer_allowed(1000, 1000));
        assert!(!peer_allowed(1001, 1000));
        assert!(!peer_allowed(0, 1000));
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let dir = std::env::temp_dir().join(format!("boxwood-ipc-test-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private_dir(&dir, uid).is_err());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(make_private_dir(&dir, uid).is_ok());
        assert!(make_private_dir(&dir, uid + 1).is_err());
        fs::remove_dir(&dir).unwrap();
    }
}
