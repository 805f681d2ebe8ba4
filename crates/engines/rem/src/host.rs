//! The host's side of running generated code: its segment base, its floating-point unit, its signals.
#![allow(unsafe_code)] // sets registers and signal handlers

use std::cell::Cell;
use std::sync::OnceLock;

use cpum::state::XsaveArea;

/// What the code generator may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    pub(crate) avx: bool,
    pub(crate) bmi2: bool,
    pub(crate) fsgsbase: bool,
}

/// Features masked for tests: `BOXWOOD_REM_WITHOUT=avx,bmi2,fsgsbase`.
const MASK_VARIABLE: &str = "BOXWOOD_REM_WITHOUT";

impl Features {
    pub(crate) fn detect() -> Self {
        let masked = std::env::var(MASK_VARIABLE).unwrap_or_default();
        let has = |name: &str, present: bool| present && !masked.split(',').any(|m| m.trim() == name);
        /// AT_HWCAP2 bit 1: the kernel lets programs use WRGSBASE.
        const HWCAP2_FSGSBASE: u64 = 2;
        // SAFETY: reads the auxiliary vector.
        let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        Self {
            avx: has("avx", std::is_x86_feature_detected!("avx")),
            bmi2: has("bmi2", std::is_x86_feature_detected!("bmi2")),
            fsgsbase: has("fsgsbase", hwcap2 & HWCAP2_FSGSBASE != 0),
        }
    }

    /// Points GS at the context.
    pub(crate) fn set_gs(&self, base: u64) {
        if self.fsgsbase {
            // SAFETY: nothing in a Rust program on this platform uses GS; the kernel allows the instruction.
            unsafe { std::arch::asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags)) };
        } else {
            const ARCH_SET_GS: i32 = 0x1001;
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        }
    }
}

/// An FXSAVE image.
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Puts the x87 state and MXCSR of the host unit, which are the guest's, into `area`. Host pointers in the x87 state are left out.
pub(crate) fn save_unit(area: &mut XsaveArea) {
    let mut image = Image([0; 512]);
    // SAFETY: the image is 512 bytes and aligned.
    unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) &raw mut image, options(nostack, preserves_flags)) };
    area.0[..28].copy_from_slice(&image.0[..28]);
    // The last instruction's opcode and addresses are the host's.
    area.0[6..24].fill(0);
    area.0[32..160].copy_from_slice(&image.0[32..160]);
}

/// Loads the x87 state, MXCSR (and the XMM registers, which generated code loads anew) from `area`.
pub(crate) fn load_unit(area: &XsaveArea) {
    // SAFETY: the legacy part of the area is an FXSAVE image, aligned to 64 bytes; MXCSR in it has no reserved bits, because the
    // interpreter lets none in.
    unsafe {
        std::arch::asm!("fxrstor64 [{}]", in(reg) area.0.as_ptr(), options(nostack, preserves_flags), out("xmm0") _,
            out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
            out("xmm14") _, out("xmm15") _);
    }
}

/// Gives the unit the state that host code expects.
pub(crate) fn reset_unit() {
    let mxcsr = 0x1f80u32;
    // SAFETY: the state that the ABI demands.
    unsafe {
        std::arch::asm!("fninit", "ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, preserves_flags));
    }
}

thread_local! {
    /// The generated code that this thread may be running: start, length, and where host exceptions in it go on.
    static RUNNING: Cell<(u64, u64, u64)> = const { Cell::new((0, 0, 0)) };
}

/// Tells the signal handler where generated code lies that this thread is about to run.
pub(crate) fn announce(start: u64, len: u64, on_fault: u64) {
    RUNNING.with(|r| r.set((start, len, on_fault)));
}

/// Whether generated code may use XSAVE, XSAVEC and XRSTOR.
pub(crate) fn has_xsave() -> bool {
    std::is_x86_feature_detected!("xsave") && std::is_x86_feature_detected!("xsavec")
}

/// The signals that are looked at, and the actions before.
const SIGNALS: [i32; 2] = [libc::SIGFPE, libc::SIGSEGV];
static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];

/// Sees to it that division errors in generated code are the guest's, and #GP where it says that it may raise that. Once for the process.
pub(crate) fn handle_signals() -> std::io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: the handler only reads thread-local numbers and changes the context it is given; the old action is kept and
        // called for signals that are not ours.
        unsafe {
            for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut old);
                let _ = previous.set(old);
                if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                    return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
                }
            }
        }
        Ok(())
    });
    done.map_err(std::io::Error::from_raw_os_error)
}

/// Whether generated code, which was interrupted, said that the instruction at work may raise #GP.
fn may_fault() -> bool {
    let masked: u64;
    // SAFETY: GS is the context's base while generated code runs.
    unsafe {
        std::arch::asm!("mov {}, gs:[{at}]", out(reg) masked, at = const crate::context::off::MASKED,
            options(nostack, readonly, preserves_flags));
    }
    masked != 0
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let (start, len, on_fault) = RUNNING.with(Cell::get);
    let registers = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid context to handlers with SA_SIGINFO.
    let rip = unsafe { &mut (*registers).uc_mcontext.gregs[libc::REG_RIP as usize] };
    if (*rip as u64).wrapping_sub(start) < len && (signal != libc::SIGSEGV || may_fault()) {
        *rip = on_fault as i64;
        return;
    }
    // SAFETY: hands the signal on as it would have come without this handler.
    unsafe {
        let known = SIGNALS.iter().position(|&s| s == signal);
        match known.and_then(|n| PREVIOUS[n].get()) {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                if old.sa_flags & libc::SA_SIGINFO != 0 {
                    let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    f(signal, info, context);
                } else {
                    let f: extern "C" fn(i32) = std::mem::transmute(old.sa_sigaction);
                    f(signal);
                }
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
