//! The key store: a disk's data encryption key, wrapped by a password.
//!
//! ```text
//! 0  "SCNE"              70  key's length u32         110  salt of the digest (32)       178  iterations of the key u32
//! 4  version u16 0x100   74  key's digest (32)        142  iterations of the digest u32  182  length of the wrapped key u32
//! 6  cipher (32)        106  digest's length u32      146  salt of the key (32)          186  wrapped key (64)
//! 38 key derivation (32)
//! ```
//!
//! Integers are little endian, texts end with a zero byte. As a property of the medium it is written in base64. The password and
//! the key's salt make, by PBKDF2, a key of the same length, with which the data encryption key is one XTS data unit with the
//! number 0. The digest is PBKDF2 of the data encryption key itself; by it a wrong password is told.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{Algorithm, Dek, MAX_KEY, Xts, fill_random};

const LEN: usize = 250;
const MAGIC: &[u8; 4] = b"SCNE";
const VERSION: [u8; 2] = [0, 1];
const SALT: usize = 32;
/// The fewest iterations of a new key store, and those of its digest.
const MIN_ITERATIONS: u32 = 20_000;
/// How long a new key store's password is to take to be tried.
const TRY_TIME: Duration = Duration::from_millis(250);
/// More iterations than any host was given; what asks for more is there to keep us busy.
const MAX_ITERATIONS: u32 = 100_000_000;
/// Characters of base64 in a line, as VirtualBox writes it.
const LINE: usize = 64;

/// What can be wrong with a key store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyStoreError {
    #[error("the key store is damaged: {0}")]
    Damaged(String),
    #[error("the key store names the {what} \"{name}\", which is not known")]
    Unknown { what: &'static str, name: String },
    #[error("the password does not fit the key store")]
    WrongPassword,
    #[error("the host has no random numbers ({0})")]
    NoRandom(String),
}

/// The hash under PBKDF2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha1,
    Sha256,
}

impl Hash {
    const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "PBKDF2-SHA1",
            Self::Sha256 => "PBKDF2-SHA256",
        }
    }

    const fn digest_len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    fn derive(self, secret: &[u8], salt: &[u8; SALT], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, out),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, out),
        }
    }
}

/// A key store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyStore {
    algorithm: Algorithm,
    hash: Hash,
    digest: [u8; 32],
    digest_salt: [u8; SALT],
    digest_iterations: u32,
    key_salt: [u8; SALT],
    key_iterations: u32,
    wrapped: [u8; MAX_KEY],
}

fn array<const N: usize>(raw: &[u8; LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| raw.get(at + i).copied().unwrap_or(0))
}

fn name(raw: &[u8; LEN], at: usize) -> String {
    let field: [u8; 32] = array(raw, at);
    let text = field.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

impl KeyStore {
    /// Wraps `dek` by the password, with as many iterations as take a good while here.
    pub fn create(dek: &Dek, password: &str) -> Result<Self, KeyStoreError> {
        Self::create_with(dek, password, iterations(password.len(), dek.algorithm))
    }

    fn create_with(dek: &Dek, password: &str, iterations: u32) -> Result<Self, KeyStoreError> {
        let mut new = Self {
            algorithm: dek.algorithm,
            hash: Hash::Sha256,
            digest: [0; 32],
            digest_salt: [0; SALT],
            digest_iterations: MIN_ITERATIONS,
            key_salt: [0; SALT],
            key_iterations: iterations,
            wrapped: [0; MAX_KEY],
        };
        let random = fill_random(&mut new.key_salt).and_then(|()| fill_random(&mut new.digest_salt));
        random.map_err(|e| KeyStoreError::NoRandom(e.to_string()))?;
        new.digest = new.digest_of(dek.bytes());
        let mut wrapped = [0; MAX_KEY];
        let key = &mut wrapped[..dek.bytes().len()];
        key.copy_from_slice(dek.bytes());
        new.wrapping(password).unit(0, key, true);
        new.wrapped = wrapped;
        Ok(new)
    }

    /// Reads a key store from a medium's property.
    pub fn decode(text: &str) -> Result<Self, KeyStoreError> {
        let damaged = |what: String| KeyStoreError::Damaged(what);
        // VirtualBox breaks lines, by the host's custom.
        let text: Vec<u8> =
            text.bytes().filter(|b| !b.is_ascii_whitespace()).take(4 * LEN.div_ceil(3) + 1).collect();
        let raw = STANDARD.decode(text).map_err(|e| damaged(e.to_string()))?;
        let raw: [u8; LEN] = raw
            .try_into()
            .map_err(|raw: Vec<u8>| damaged(format!("it has {} bytes instead of {LEN}", raw.len())))?;
        if !raw.starts_with(MAGIC) || raw[4..6] != VERSION {
            return Err(damaged("its signature or its version is not the known one".into()));
        }
        let word = |at| u32::from_le_bytes(array(&raw, at));
        let (cipher, derivation) = (name(&raw, 6), name(&raw, 38));
        let algorithm =
            Algorithm::from_name(&cipher).ok_or(KeyStoreError::Unknown { what: "cipher", name: cipher })?;
        let hash = [Hash::Sha1, Hash::Sha256].into_iter().find(|h| h.name() == derivation);
        let hash = hash.ok_or(KeyStoreError::Unknown { what: "key derivation", name: derivation })?;
        for (what, at, wanted) in [
            ("key", 70, algorithm.key_len()),
            ("digest", 106, hash.digest_len()),
            ("wrapped key", 182, algorithm.key_len()),
        ] {
            if word(at) as usize != wanted {
                return Err(damaged(format!("a {what} of {} bytes instead of {wanted}", word(at))));
            }
        }
        let new = Self {
            algorithm,
            hash,
            digest: array(&raw, 74),
            digest_salt: array(&raw, 110),
            digest_iterations: word(142),
            key_salt: array(&raw, 146),
            key_iterations: word(178),
            wrapped: array(&raw, 186),
        };
        for count in [new.digest_iterations, new.key_iterations] {
            if !(1..=MAX_ITERATIONS).contains(&count) {
                return Err(damaged(format!("{count} iterations, where 1 to {MAX_ITERATIONS} are taken")));
            }
        }
        Ok(new)
    }

    /// The text for a medium's property.
    pub fn encode(&self) -> String {
        let mut raw = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        let key_len = (self.algorithm.key_len() as u32).to_le_bytes();
        put(0, MAGIC);
        put(4, &VERSION);
        put(6, self.algorithm.name().as_bytes());
        put(38, self.hash.name().as_bytes());
        put(70, &key_len);
        put(74, &self.digest);
        put(106, &(self.hash.digest_len() as u32).to_le_bytes());
        put(110, &self.digest_salt);
        put(142, &self.digest_iterations.to_le_bytes());
        put(146, &self.key_salt);
        put(178, &self.key_iterations.to_le_bytes());
        put(182, &key_len);
        put(186, &self.wrapped);
        let text = STANDARD.encode(raw);
        let lines: Vec<&str> = (0..text.len())
            .step_by(LINE)
            .filter_map(|at| text.get(at..(at + LINE).min(text.len())))
            .collect();
        lines.join("\n")
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The data encryption key, if the password is the right one. Takes a good while on purpose.
    pub fn unlock(&self, password: &str) -> Result<Dek, KeyStoreError> {
        let mut dek = Dek { algorithm: self.algorithm, bytes: Zeroizing::new(self.wrapped) };
        self.wrapping(password).unit(0, &mut dek.bytes[..self.algorithm.key_len()], false);
        if self.digest_of(dek.bytes()) == self.digest { Ok(dek) } else { Err(KeyStoreError::WrongPassword) }
    }

    /// The cipher that wraps the data encryption key.
    fn wrapping(&self, password: &str) -> Xts {
        let mut key = Zeroizing::new([0; MAX_KEY]);
        let key = &mut key[..self.algorithm.key_len()];
        self.hash.derive(password.as_bytes(), &self.key_salt, self.key_iterations, key);
        Xts::new(self.algorithm, key)
    }

    fn digest_of(&self, dek: &[u8]) -> [u8; 32] {
        let mut digest = [0; 32];
        let len = self.hash.digest_len();
        self.hash.derive(dek, &self.digest_salt, self.digest_iterations, &mut digest[..len]);
        // What stands behind a shorter digest says nothing.
        digest[len..].copy_from_slice(&self.digest[len..]);
        digest
    }
}

/// How many iterations take about [`TRY_TIME`].
fn iterations(password_len: usize, algorithm: Algorithm) -> u32 {
    let (password, mut key) = (vec![0; password_len], [0; MAX_KEY]);
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < TRY_TIME && count < MAX_ITERATIONS / 2 {
        let key = &mut key[..algorithm.key_len()];
        Hash::Sha256.derive(&password, &[0; SALT], MIN_ITERATIONS, key);
        count += MIN_ITERATIONS;
    }
    count.max(MIN_ITERATIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
    }

    /// The parts of a key store that VirtualBox made, as password crackers publish them.
    fn published(iterations: u32, parts: [&str; 4]) -> KeyStore {
        KeyStore {
            algorithm: Algorithm::AesXts256,
            hash: Hash::Sha256,
            digest: hex(parts[3]),
            digest_salt: hex(parts[2]),
            digest_iterations: 20_000,
            key_salt: hex(parts[0]),
            key_iterations: iterations,
            wrapped: hex(parts[1]),
        }
    }

    #[test]
    fn key_stores_that_virtualbox_made_are_unlocked() {
        let store = published(
            160_000,
            [
                "54aff69fca91c20b3b15618c6732c4a2f953dd88690cd4cc731569b6b80b5572",
                "cfb003087e0c618afa9ad7e44adcd97517f039e0424dedb46db8affbb73cd064\
                 019abae19ee5e4f5b05b626e6bc5d7da65c61a5f94d7bcac521c388276e5358b",
                "2e5729055136168eea79cb3f1765450a35ab7540125f2ca2a46924a99fd0524d",
                "b28d1db1cabe99ca989a405c33a27beeb9c0683b8b4b54b0e0d85f712f64d89c",
            ],
        );
        let read = KeyStore::decode(&store.encode()).unwrap();
        assert_eq!(read, store);
        let dek = read.unlock("hashcat").unwrap();
        assert_eq!(dek.bytes()[..8], hex::<8>("9f466aab18634338"));
        assert!(matches!(read.unlock("hashcats"), Err(KeyStoreError::WrongPassword)));
        let store = published(
            540_000,
            [
                "546291a6074943b096ea80db2ae39d4179de6d1c3f17ea25d62e627abfa7fbcb",
                "a386a5432e938f20c8fbc9af460a78c1790c19abd1c51e9c0be724939c948158\
                 6180fc4a34135d8481e436d8c132b8f4b9a550de4b248300ba32b18b645865d6",
                "e9608bcdd8c070868859a31c9f1e5e5de98b5ead8c21f25c0c43ee697816e32c",
                "5442057bc804a3a914607decea5574aa7038cdce0d498c7fc434afe8cd5b244f",
            ],
        );
        let dek = store.unlock("computer").unwrap();
        assert_eq!(dek.bytes()[56..], hex::<8>("b55d77fe63f6dce1"));
    }

    #[test]
    fn a_key_comes_back_by_its_password_and_by_no_other() {
        for algorithm in [Algorithm::AesXts128, Algorithm::AesXts256] {
            let dek = Dek::random(algorithm).unwrap();
            let store = KeyStore::create_with(&dek, "sesam öffne dich", MIN_ITERATIONS).unwrap();
            let text = store.encode();
            assert!(text.starts_with("U0NORQABQUVTLVhUUz") && text.lines().all(|line| line.len() <= LINE));
            // As in files of hosts that end lines otherwise.
            let read = KeyStore::decode(&text.replace('\n', "\r\n")).unwrap();
            assert_eq!(read.algorithm(), algorithm);
            assert_eq!(read.unlock("sesam öffne dich").unwrap().bytes(), dek.bytes());
            assert!(matches!(read.unlock(""), Err(KeyStoreError::WrongPassword)));
        }
    }

    #[test]
    fn damaged_and_hostile_key_stores_are_refused() {
        let dek = Dek::random(Algorithm::AesXts128).unwrap();
        let good = KeyStore::create_with(&dek, "x", 1).unwrap().encode();
        let raw = STANDARD.decode(good.replace('\n', "")).unwrap();
        let with = |at: usize, byte: u8| {
            let mut raw = raw.clone();
            raw[at] = byte;
            KeyStore::decode(&STANDARD.encode(raw))
        };
        assert!(with(0, b'S').is_ok());
        for (at, byte) in [(0, b'X'), (5, 2), (10, b'!'), (49, b'!'), (70, 64), (106, 20), (182, 33)] {
            assert!(with(at, byte).is_err(), "byte {at}");
        }
        let busy = with(181, 0xff).unwrap_err();
        assert!(busy.to_string().contains("iterations"), "{busy}");
        assert!(KeyStore::decode("").is_err() && KeyStore::decode(&"A".repeat(100_000)).is_err());
    }
}
