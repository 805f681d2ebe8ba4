//! A private VBoxSVC per test: its own configuration directory, and programs that the test chooses.

#![allow(unsafe_code, dead_code, unreachable_pub)] // Unsafe: the test process sets PATH once, before it starts anything.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, mpsc};
use std::time::{Duration, Instant};

use main_api::enums::*;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::vm_process::{ConsoleBackend, ScreenResolution, VmProcess};
use main_api::{Client, Proxy, Session};

/// A directory with VBoxSVC and a VBoxHeadless that is this very test program (see [`fake_vm`]), put into PATH.
static PROGRAMS: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("boxwood-bin-{}", std::process::id()));
    // Test programs that have ended cannot remove theirs: other tests of the same program may still use it.
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("boxwood-bin-");
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let service = Path::new(env!("CARGO_BIN_EXE_VBoxSVC"));
    if fs::hard_link(service, dir.join("VBoxSVC")).is_err() {
        fs::copy(service, dir.join("VBoxSVC")).unwrap();
    }
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "#!/bin/sh\nFAKE_VM=\"$4\" exec '{}' --ignored --exact fake_vm_process --nocapture\n",
        this.display()
    );
    let headless = dir.join("VBoxHeadless");
    fs::write(&headless, script).unwrap();
    fs::set_permissions(&headless, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    // SAFETY: every test comes here first, and nothing else in this program changes the environment.
    unsafe { std::env::set_var("PATH", format!("{}:{path}", dir.display())) };
    dir
});

/// A test's configuration directory, with its service.
pub struct Home {
    pub dir: PathBuf,
}

impl Home {
    pub fn new(name: &str) -> Self {
        LazyLock::force(&PROGRAMS);
        let dir = std::env::temp_dir().join(format!("boxwood-test-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self { dir }
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    pub fn client(&self) -> Client {
        let client = Client::connect_to(&self.config()).unwrap();
        let properties = client.virtual_box().object(IVirtualBox::SystemProperties).unwrap();
        let folder = self.dir.join("vms").display().to_string();
        if properties.read(ISystemProperties::DefaultMachineFolder).unwrap() != folder {
            properties.write(ISystemProperties::DefaultMachineFolder, folder).unwrap();
        }
        client
    }

    /// The process id of the service; 0 if none runs.
    pub fn service_pid(&self) -> i32 {
        let lock = self.config().join("VBoxSVC.lock");
        let Ok(text) = fs::read_to_string(&lock) else { return 0 };
        let Ok(stream) = std::os::unix::net::UnixStream::connect(text.trim()) else { return 0 };
        rustix::net::sockopt::socket_peercred(&stream).map_or(0, |c| c.pid.as_raw_nonzero().get())
    }

    /// Kills the service as `kill -9` does, and waits until it is gone.
    pub fn kill_service(&self) {
        let pid = self.service_pid();
        assert_ne!(pid, 0, "no service to kill");
        kill(pid);
        wait_until("the service is dead", || self.service_pid() == 0);
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let pid = self.service_pid();
        if pid != 0 {
            kill(pid);
            let socket = fs::read_to_string(self.config().join("VBoxSVC.lock")).unwrap_or_default();
            let _ = fs::remove_file(socket.trim());
        }
        for entry in fs::read_dir(self.config().join("VMs")).into_iter().flatten().flatten() {
            let line = fs::read_to_string(entry.path()).unwrap_or_default();
            if let Some(pid) = line.split_whitespace().nth(1).and_then(|w| w.parse().ok()) {
                kill(pid);
            }
        }
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

pub fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Creates, saves and registers a machine.
pub fn create(client: &Client, name: &str) -> Proxy<IMachine> {
    let vbox = client.virtual_box();
    let args = (
        String::new(),
        name.to_owned(),
        vec![],
        "Debian_64".to_owned(),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
    );
    let machine = client.at(vbox.call(IVirtualBox::CreateMachine, args).unwrap());
    machine.call(IMachine::SaveSettings, ()).unwrap();
    vbox.call(IVirtualBox::RegisterMachine, (machine.reference(),)).unwrap();
    client.find_machine(name).unwrap()
}

/// Starts the machine's VM and waits until it runs. The session has a shared lock then.
pub fn start(client: &Client, machine: &Proxy<IMachine>) -> Session {
    let session = client.create_session().unwrap();
    let args = (session.reference(), "headless".to_owned(), vec![]);
    let progress = machine.at(machine.call(IMachine::LaunchVMProcess, args).unwrap());
    progress.wait(|_| {}).unwrap();
    session
}

pub fn state(machine: &Proxy<IMachine>) -> MachineState {
    machine.read(IMachine::State).unwrap()
}

/// A VM that does nothing but be there.
struct FakeVm {
    off: mpsc::SyncSender<()>,
}

impl ConsoleBackend for FakeVm {
    fn state(&self) -> MachineState {
        MachineState::Running
    }

    fn pause(&self) -> ApiResult<()> {
        Ok(())
    }

    fn resume(&self) -> ApiResult<()> {
        Err(main_api::vm_process::invalid_state(MachineState::Running))
    }

    fn reset(&self) -> ApiResult<()> {
        Ok(())
    }

    fn power_down(&self) -> ApiResult<()> {
        let _ = self.off.try_send(());
        Ok(())
    }

    fn power_button(&self) -> ApiResult<()> {
        Ok(())
    }

    fn sleep_button(&self) -> ApiResult<()> {
        Ok(())
    }

    fn power_button_handled(&self) -> ApiResult<bool> {
        Ok(false)
    }

    fn guest_entered_acpi_mode(&self) -> ApiResult<bool> {
        Ok(true)
    }

    fn put_scancodes(&self, codes: &[u8]) -> ApiResult<usize> {
        Ok(codes.len())
    }

    fn release_keys(&self) -> ApiResult<()> {
        Ok(())
    }

    fn mouse_absolute_supported(&self) -> bool {
        false
    }

    fn put_mouse_event(&self, _: i32, _: i32, _: i32, _: i32, _: i32) -> ApiResult<()> {
        Ok(())
    }

    fn put_mouse_event_absolute(&self, _: i32, _: i32, _: i32, _: i32, _: i32) -> ApiResult<()> {
        Ok(())
    }

    fn screen_resolution(&self, _: u32) -> ApiResult<ScreenResolution> {
        Ok(ScreenResolution {
            width: 720,
            height: 400,
            bits_per_pixel: 32,
            x_origin: 0,
            y_origin: 0,
            status: GuestMonitorStatus::Enabled,
        })
    }

    fn take_screenshot_png(&self, _: u32, _: u32, _: u32) -> ApiResult<Vec<u8>> {
        Ok(vec![0x89; 300_000])
    }

    fn set_video_mode_hint(&self, _: u32, _: u32, _: u32, _: u32) -> ApiResult<()> {
        Ok(())
    }

    fn execution_engine(&self) -> VMExecutionEngine {
        VMExecutionEngine::Interpreter
    }

    fn statistics(&self, _: &str, _: bool) -> ApiResult<String> {
        Ok(String::new())
    }

    fn registers(&self, _: u32) -> ApiResult<Vec<(String, String)>> {
        Ok(Vec::new())
    }

    fn set_registers(&self, _: u32, _: &[(String, String)]) -> ApiResult<()> {
        Ok(())
    }

    fn inject_nmi(&self) -> ApiResult<()> {
        Ok(())
    }

    fn reset_statistics(&self, _: &str) -> ApiResult<()> {
        Ok(())
    }

    fn info(&self, _: &str, _: &str) -> ApiResult<String> {
        Ok(String::new())
    }

    fn uptime(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn storage_changed(&self, _force: bool, _settings: &str, _folder: &str) -> ApiResult<()> {
        Ok(())
    }

    fn network_adapter_changed(&self, _slot: u32, _settings: &str) -> ApiResult<()> {
        Ok(())
    }

    fn set_bandwidth(&self, _group: &str, _bytes_per_second: u64) -> ApiResult<()> {
        Ok(())
    }

    /// This guest lets all CPUs go but the third.
    fn plug_cpu(&self, cpu: u32, plugged: bool) -> ApiResult<()> {
        if cpu == 2 && !plugged {
            return Err(ApiError::new(vbox_types::ResultCode::VmError, "still used"));
        }
        Ok(())
    }

    fn add_encryption_password(&self, _: &str, _: &str, _: bool) -> ApiResult<()> {
        Ok(())
    }

    fn remove_encryption_password(&self, _: &str) -> ApiResult<()> {
        Ok(())
    }

    fn clear_encryption_passwords(&self) {}

    /// This VM cannot run for so little of the time.
    fn set_execution_cap(&self, percent: u32) -> ApiResult<()> {
        if percent > 1 { Ok(()) } else { Err(ApiError::fail("no thread")) }
    }
}

/// What this program does when VBoxSVC starts it as VBoxHeadless.
pub fn fake_vm() {
    let Ok(machine) = std::env::var("FAKE_VM") else { return };
    let (vm, config) = match VmProcess::open(&machine) {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("fake VM: {error}");
            std::process::exit(1);
        }
    };
    vm.set_state(MachineState::Starting).unwrap();
    if config.settings.contains("Fake/FailToStart") {
        vm.finish(MachineState::PoweredOff, Some(ApiError::fail("the fake VM was told to fail")));
        std::process::exit(1);
    }
    vm.set_progress(50, "Halfway");
    let (off, switched_off) = mpsc::sync_channel(1);
    vm.serve_console(Arc::new(FakeVm { off }));
    vm.set_state(MachineState::Running).unwrap();
    if config.settings.contains("Fake/Crash") {
        vm.runtime_error(false, main_api::runtime_error::GUEST_CRASH, "the fake guest has crashed").unwrap();
    }
    switched_off.recv().unwrap();
    vm.set_state(MachineState::Stopping).unwrap();
    vm.finish(MachineState::PoweredOff, None);
    std::process::exit(0);
}

/// This test program running one of its ignored tests as another process.
pub fn helper(test: &str) -> Command {
    LazyLock::force(&PROGRAMS);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command
}
