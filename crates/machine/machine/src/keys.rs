//! Passwords of encrypted disks while a machine runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use vd::KeyStoreError;
use zeroize::Zeroizing;

use crate::block::ImageDriver;
use crate::config::MediumConfig;
use crate::limit::Limit;

/// Why a password was not taken.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("a password with the given ID already exists")]
    Exists,
    #[error("the password for ID \"{0}\" is not correct for at least one disk using this ID")]
    Wrong(String),
    #[error("a disk cannot be unlocked")]
    Store(#[source] KeyStoreError),
}

struct Password {
    text: Zeroizing<String>,
    clear_on_suspend: bool,
}

/// The passwords by their ids, and whether the guest waits for one that is not there.
#[derive(Default)]
pub struct Keys {
    passwords: Mutex<BTreeMap<String, Password>>,
    missing: Mutex<bool>,
    changed: Condvar,
}

impl Keys {
    /// Opens a medium, with the limit of its group; an encrypted one is unlocked if its password was given before.
    pub fn open(
        self: &Arc<Self>,
        medium: &MediumConfig,
        limit: Option<Arc<Limit>>,
    ) -> anyhow::Result<Arc<ImageDriver>> {
        let keys = Arc::downgrade(self);
        let missing = move || {
            if let Some(keys) = keys.upgrade() {
                *keys.missing.lock() = true;
                keys.changed.notify_all();
            }
        };
        let image = ImageDriver::open(medium, limit, Arc::new(missing))?;
        let passwords = self.passwords.lock();
        // A wrong one is told when it is given for this disk again.
        if let Some(password) = image.key_id().and_then(|id| passwords.get(id))
            && let Ok(Some(dek)) = image.try_password(&password.text)
        {
            image.unlock(&dek);
        }
        Ok(image)
    }

    /// Waits, at most for `time`, until the guest waits for a key. Each wait is told once.
    pub fn missing(&self, time: Duration) -> bool {
        let mut missing = self.missing.lock();
        if !*missing {
            self.changed.wait_for(&mut missing, time);
        }
        std::mem::take(&mut missing)
    }

    /// Keeps a password if it fits all disks with its id, and unlocks these.
    pub fn add<'a>(
        &self,
        id: &str,
        password: &str,
        clear_on_suspend: bool,
        images: impl Iterator<Item = &'a Arc<ImageDriver>>,
    ) -> Result<(), KeyError> {
        let mut passwords = self.passwords.lock();
        if passwords.contains_key(id) {
            return Err(KeyError::Exists);
        }
        let mut found = Vec::new();
        for image in images.filter(|image| image.key_id() == Some(id)) {
            match image.try_password(password) {
                Ok(Some(dek)) => found.push((image, dek)),
                Ok(None) => {}
                Err(KeyStoreError::WrongPassword) => return Err(KeyError::Wrong(id.to_owned())),
                Err(other) => return Err(KeyError::Store(other)),
            }
        }
        for (image, dek) in found {
            image.unlock(&dek);
        }
        let text = Zeroizing::new(password.to_owned());
        passwords.insert(id.to_owned(), Password { text, clear_on_suspend });
        Ok(())
    }

    pub fn remove(&self, id: &str) -> bool {
        self.passwords.lock().remove(id).is_some()
    }

    pub fn clear(&self) {
        self.passwords.lock().clear();
    }

    /// Takes the passwords away that are not to outlive a pause, with the keys of their disks.
    pub fn suspended<'a>(&self, images: impl Iterator<Item = &'a Arc<ImageDriver>>) {
        let mut passwords = self.passwords.lock();
        for image in images {
            let gone = image.key_id().and_then(|id| passwords.get(id)).is_some_and(|p| p.clear_on_suspend);
            if gone && let Err(error) = image.lock() {
                tracing::error!(target: "storage", %error, "the guest's last writes to an encrypted disk are lost");
            }
        }
        passwords.retain(|_, password| !password.clear_on_suspend);
    }
}
