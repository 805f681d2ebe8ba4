//! VirtualBox's result codes: what the Main API's errors carry and clients parse.

use std::fmt;

macro_rules! result_codes {
    ($($(#[$doc:meta])* $variant:ident = $value:literal, $name:literal;)*) => {
        /// An HRESULT of the Main API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum ResultCode { $($(#[$doc])* $variant = $value,)* }

        impl ResultCode {
            /// The code with the numeric value `value`.
            pub fn from_u32(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$variant),)* _ => None }
            }

            /// The code whose symbolic name is `name`.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }

            /// The symbolic name, as `VBoxManage` prints it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

result_codes! {
    ObjectNotFound = 0x80bb_0001, "VBOX_E_OBJECT_NOT_FOUND";
    InvalidVmState = 0x80bb_0002, "VBOX_E_INVALID_VM_STATE";
    VmError = 0x80bb_0003, "VBOX_E_VM_ERROR";
    FileError = 0x80bb_0004, "VBOX_E_FILE_ERROR";
    IprtError = 0x80bb_0005, "VBOX_E_IPRT_ERROR";
    PdmError = 0x80bb_0006, "VBOX_E_PDM_ERROR";
    InvalidObjectState = 0x80bb_0007, "VBOX_E_INVALID_OBJECT_STATE";
    HostError = 0x80bb_0008, "VBOX_E_HOST_ERROR";
    NotSupported = 0x80bb_0009, "VBOX_E_NOT_SUPPORTED";
    XmlError = 0x80bb_000a, "VBOX_E_XML_ERROR";
    InvalidSessionState = 0x80bb_000b, "VBOX_E_INVALID_SESSION_STATE";
    ObjectInUse = 0x80bb_000c, "VBOX_E_OBJECT_IN_USE";
    PasswordIncorrect = 0x80bb_000d, "VBOX_E_PASSWORD_INCORRECT";
    MaximumReached = 0x80bb_000e, "VBOX_E_MAXIMUM_REACHED";
    GstctlGuestError = 0x80bb_000f, "VBOX_E_GSTCTL_GUEST_ERROR";
    Timeout = 0x80bb_0010, "VBOX_E_TIMEOUT";
    DndError = 0x80bb_0011, "VBOX_E_DND_ERROR";
    NotImpl = 0x8000_4001, "E_NOTIMPL";
    NoInterface = 0x8000_4002, "E_NOINTERFACE";
    Pointer = 0x8000_4003, "E_POINTER";
    Abort = 0x8000_4004, "E_ABORT";
    Fail = 0x8000_4005, "E_FAIL";
    Unexpected = 0x8000_ffff, "E_UNEXPECTED";
    AccessDenied = 0x8007_0005, "E_ACCESSDENIED";
    OutOfMemory = 0x8007_000e, "E_OUTOFMEMORY";
    InvalidArg = 0x8007_0057, "E_INVALIDARG";
}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (0x{:08x})", self.name(), *self as u32)
    }
}
