//! The Main API's errors: VirtualBox's result code, its text, and the component and interface that raised it.
//!
//! On D-Bus an error's name is `org.virtualbox.Error.<code name>`; its body is text, numeric code, component and
//! interface, in this order, because generic D-Bus tools print a body's first string.

use std::fmt;

use vbox_types::ResultCode;

pub type ApiResult<T> = Result<T, ApiError>;

/// Prefix of the D-Bus error names.
pub const ERROR_PREFIX: &str = "org.virtualbox.Error.";

/// An error of the Main API, or of the way to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HRESULT. Kept as a number, since a newer service may know codes that this build does not.
    pub code: u32,
    /// VirtualBox's text, without a full stop, possibly of several lines.
    pub text: String,
    /// The C++ class that VirtualBox names, for example `MachineWrap`. Empty when no object was involved.
    pub component: String,
    /// The interface, for example `IMachine`.
    pub interface: String,
}

impl ApiError {
    pub fn new(code: ResultCode, text: impl Into<String>) -> Self {
        Self { code: code as u32, text: text.into(), component: String::new(), interface: String::new() }
    }

    /// Names the interface that raised the error; the component is VirtualBox's wrapper class for it.
    /// An interface that an inner layer named already stays.
    #[must_use]
    pub fn on(mut self, interface: &str) -> Self {
        if self.interface.is_empty() {
            self.interface = interface.to_owned();
            self.component = component_of(interface);
        }
        self
    }

    pub fn invalid_arg(text: impl Into<String>) -> Self {
        Self::new(ResultCode::InvalidArg, text)
    }

    pub fn not_found(text: impl Into<String>) -> Self {
        Self::new(ResultCode::ObjectNotFound, text)
    }

    pub fn fail(text: impl Into<String>) -> Self {
        Self::new(ResultCode::Fail, text)
    }

    /// The code, if this build knows it.
    pub fn result_code(&self) -> Option<ResultCode> {
        ResultCode::from_u32(self.code)
    }

    pub fn is(&self, code: ResultCode) -> bool {
        self.code == code as u32
    }

    /// The code's symbolic name, or its number.
    pub fn code_name(&self) -> String {
        match self.result_code() {
            Some(code) => code.name().to_owned(),
            None => format!("0x{:08x}", self.code),
        }
    }

    /// The name under which the error travels.
    pub fn dbus_name(&self) -> String {
        match self.result_code() {
            Some(code) => format!("{ERROR_PREFIX}{}", code.name()),
            None => format!("{ERROR_PREFIX}HRESULT_{:08X}", self.code),
        }
    }

    /// What `VBoxManage` prints after `error: Details: `, without the callee.
    pub fn details(&self) -> String {
        let code = match self.result_code() {
            Some(code) => code.to_string(),
            None => format!("0x{:08x}", self.code),
        };
        if self.component.is_empty() && self.interface.is_empty() {
            return format!("code {code}");
        }
        format!("code {code}, component {}, interface {}", self.component, self.interface)
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for ApiError {}

/// The class that VirtualBox's error texts name for an interface: the generated wrapper around the implementation.
fn component_of(interface: &str) -> String {
    match interface {
        "" => String::new(),
        // A machine that a session holds is the same class as a registered one.
        name => format!("{}Wrap", name.strip_prefix('I').unwrap_or(name)),
    }
}

impl From<zbus::Error> for ApiError {
    /// Reads VirtualBox's code and text out of an error reply; anything else is a broken connection.
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, text, reply) => {
                let body = reply.body();
                if name.as_str().starts_with(ERROR_PREFIX)
                    && let Ok((text, code, component, interface)) =
                        body.deserialize::<(String, u32, String, String)>()
                {
                    return Self { code, text, component, interface };
                }
                Self::fail(format!("{}: {}", name.as_str(), text.unwrap_or_default()))
            }
            other => Self::connection_lost(&other.to_string()),
        }
    }
}

impl ApiError {
    /// NS_ERROR_CALL_FAILED: the service, or the VM process, went away during the call.
    pub const CALL_FAILED: u32 = 0x8000_4ffe;

    pub fn connection_lost(detail: &str) -> Self {
        Self {
            code: Self::CALL_FAILED,
            text: format!("The connection to the VirtualBox service was lost ({detail})"),
            component: String::new(),
            interface: String::new(),
        }
    }

    /// Whether the peer went away, so that nothing is known of the call's outcome.
    pub fn is_connection_lost(&self) -> bool {
        self.code == Self::CALL_FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_worded_as_vboxmanage_prints_them() {
        let error = ApiError::not_found("Could not find a registered machine named 'x'").on("IVirtualBox");
        assert_eq!(
            error.details(),
            "code VBOX_E_OBJECT_NOT_FOUND (0x80bb0001), component VirtualBoxWrap, interface IVirtualBox"
        );
        assert_eq!(error.dbus_name(), "org.virtualbox.Error.VBOX_E_OBJECT_NOT_FOUND");
    }

    #[test]
    fn the_innermost_interface_stays() {
        let error = ApiError::fail("x").on("IMachine").on("IVirtualBox");
        assert_eq!(error.interface, "IMachine");
    }
}
