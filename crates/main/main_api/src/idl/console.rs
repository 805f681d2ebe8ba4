//! The objects that a VM process serves on a console connection.

use super::{IProgress, interface};
use crate::enums::*;
use crate::types::{ObjRef, Octets};

interface! {
    /// The control panel of a running machine.
    IConsole {
        attributes {
            State: MachineState, r;
            Display: ObjRef<IDisplay>, r;
            Keyboard: ObjRef<IKeyboard>, r;
            Mouse: ObjRef<IMouse>, r;
            Debugger: ObjRef<IMachineDebugger>, r;
        }
        methods {
            PowerDown() -> (progress: ObjRef<IProgress>);
            Reset() -> ();
            Pause() -> ();
            Resume() -> ();
            PowerButton() -> ();
            SleepButton() -> ();
            GetPowerButtonHandled() -> (handled: bool);
            GetGuestEnteredACPIMode() -> (entered: bool);
            /// A password for the encrypted disks whose password has this id. A machine that waits for one goes on when all disks
            /// have theirs.
            AddEncryptionPassword(id: String, password: String, clearOnSuspend: bool) -> ();
            AddEncryptionPasswords(ids: Vec<String>, passwords: Vec<String>, clearOnSuspend: bool) -> ();
            RemoveEncryptionPassword(id: String) -> ();
            ClearAllEncryptionPasswords() -> ();
        }
    }
}

interface! {
    /// The keyboard.
    IKeyboard {
        methods {
            PutScancode(scancode: i32) -> ();
            /// Returns how many codes the keyboard took.
            PutScancodes(scancodes: Vec<i32>) -> (codesStored: u32);
            PutCAD() -> ();
            ReleaseKeys() -> ();
        }
    }
}

interface! {
    /// The pointing device.
    IMouse {
        attributes {
            AbsoluteSupported: bool, r;
            RelativeSupported: bool, r;
            NeedsHostCursor: bool, r;
        }
        methods {
            PutMouseEvent(dx: i32, dy: i32, dz: i32, dw: i32, buttonState: i32) -> ();
            PutMouseEventAbsolute(x: i32, y: i32, dz: i32, dw: i32, buttonState: i32) -> ();
        }
    }
}

interface! {
    /// The screens.
    IDisplay {
        methods {
            GetScreenResolution(screenId: u32) -> (width: u32, height: u32, bitsPerPixel: u32, xOrigin: i32, yOrigin: i32,
                guestMonitorStatus: GuestMonitorStatus);
            /// Width and height may be 0 for the screen's own size.
            TakeScreenShotToArray(screenId: u32, width: u32, height: u32, bitmapFormat: BitmapFormat) -> (screenData: Octets);
            SetVideoModeHint(display: u32, enabled: bool, changeOrigin: bool, originX: i32, originY: i32, width: u32,
                height: u32, bitsPerPixel: u32, notify: bool) -> ();
        }
    }
}

interface! {
    /// The debugger's view of a running machine.
    IMachineDebugger {
        attributes {
            ExecutionEngine: VMExecutionEngine, r;
            HWVirtExEnabled: bool, r;
            HWVirtExNestedPagingEnabled: bool, r;
            OSName: String, r;
            OSVersion: String, r;
            /// Milliseconds since the machine was started.
            Uptime: i64, r;
        }
        methods {
            /// The statistics whose names match the pattern (`*` for any text), one line each.
            GetStats(pattern: String, withDescriptions: bool) -> (stats: String);
            ResetStats(pattern: String) -> ();
            Info(name: String, args: String) -> (info: String);
            /// A register of a virtual CPU, by its name in any case.
            GetRegister(cpuId: u32, name: String) -> (value: String);
            GetRegisters(cpuId: u32) -> (names: Vec<String>, values: Vec<String>);
            SetRegister(cpuId: u32, name: String, value: String) -> ();
            /// Sets all of them or none.
            SetRegisters(cpuId: u32, names: Vec<String>, values: Vec<String>) -> ();
            InjectNMI() -> ();
        }
    }
}
