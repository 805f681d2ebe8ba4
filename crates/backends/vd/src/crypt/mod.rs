//! Encryption of disks as VirtualBox has it: a filter between the virtual disk and the image, whose own format stays what it is.
//!
//! Each sector of 512 bytes is encrypted by itself with AES in XTS mode (IEEE 1619); its number on the virtual disk is the tweak
//! ("PLAIN64"). All images of a chain have the same key, which the media registry keeps, wrapped by the password, beside the base
//! image's other properties ([`KeyStore`]). Ranges that no image holds read as zeros; they are not stored and so not encrypted.

mod key_store;

use aes::cipher::inout::InOutBuf;
use aes::cipher::{BlockDecrypt, BlockEncrypt, BlockSizeUser, KeyInit, consts::U16};
use aes::{Aes128, Aes256};
use zeroize::Zeroizing;

pub use key_store::{KeyStore, KeyStoreError};

/// Bytes that are encrypted as one.
pub(crate) const SECTOR: usize = 512;
/// AES's own.
const BLOCK: usize = 16;
/// Bytes of the longest data encryption key.
const MAX_KEY: usize = 64;

/// How the sectors are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    AesXts128,
    AesXts256,
}

impl Algorithm {
    /// The name as key stores and the command line have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AesXts128 => "AES-XTS128-PLAIN64",
            Self::AesXts256 => "AES-XTS256-PLAIN64",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::AesXts128, Self::AesXts256].into_iter().find(|a| a.name() == name)
    }

    /// Bytes of a key: one for the data and one for the tweaks.
    pub(crate) const fn key_len(self) -> usize {
        match self {
            Self::AesXts128 => 32,
            Self::AesXts256 => 64,
        }
    }
}

/// A disk's data encryption key. Gone from memory when dropped.
#[derive(Clone)]
pub struct Dek {
    algorithm: Algorithm,
    bytes: Zeroizing<[u8; MAX_KEY]>,
}

impl Dek {
    /// A new key from the host's random numbers.
    pub fn random(algorithm: Algorithm) -> std::io::Result<Self> {
        let mut dek = Self { algorithm, bytes: Zeroizing::new([0; MAX_KEY]) };
        fill_random(&mut dek.bytes[..algorithm.key_len()])?;
        Ok(dek)
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.key_len()]
    }

    /// The key at work.
    pub fn cipher(&self) -> DiskCipher {
        DiskCipher(Xts::new(self.algorithm, self.bytes()))
    }
}

/// Fills the buffer with random numbers of the host.
fn fill_random(mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        let count = rustix::rand::getrandom(&mut *out, rustix::rand::GetRandomFlags::empty())?;
        out = &mut out[count..];
    }
    Ok(())
}

/// Encrypts and decrypts the sectors of a disk.
pub struct DiskCipher(Xts);

impl DiskCipher {
    /// Encrypts whole sectors in place, the first of which has the number `sector`.
    pub(crate) fn encrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, true);
    }

    /// The reverse of [`Self::encrypt`].
    pub(crate) fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, false);
    }

    fn run(&self, first: u64, data: &mut [u8], encrypt: bool) {
        debug_assert!(data.len().is_multiple_of(SECTOR));
        for (number, sector) in (first..).zip(data.chunks_mut(SECTOR)) {
            self.0.unit(number.into(), sector, encrypt);
        }
    }
}

/// The two keys of XTS: for the data and for the tweaks.
enum Xts {
    Aes128(Box<[Aes128; 2]>),
    Aes256(Box<[Aes256; 2]>),
}

impl Xts {
    fn new(algorithm: Algorithm, key: &[u8]) -> Self {
        let (data, tweak) = key.split_at(algorithm.key_len() / 2);
        let keys = [data, tweak];
        match algorithm {
            Algorithm::AesXts128 => Self::Aes128(Box::new(keys.map(|key| Aes128::new(key.into())))),
            Algorithm::AesXts256 => Self::Aes256(Box::new(keys.map(|key| Aes256::new(key.into())))),
        }
    }

    /// Encrypts or decrypts one data unit of whole blocks, at most a sector, in place.
    fn unit(&self, number: u128, data: &mut [u8], encrypt: bool) {
        match self {
            Self::Aes128(keys) => xts(keys, number, data, encrypt),
            Self::Aes256(keys) => xts(keys, number, data, encrypt),
        }
    }
}

/// IEEE 1619, 5.3 and 5.4, for data units of whole blocks. The blocks of a unit go to the cipher together, since CPUs work on
/// several at once.
fn xts<C>([data_key, tweak_key]: &[C; 2], number: u128, data: &mut [u8], encrypt: bool)
where
    C: BlockEncrypt + BlockDecrypt + BlockSizeUser<BlockSize = U16>,
{
    let mut tweak = number.to_le_bytes().into();
    tweak_key.encrypt_block(&mut tweak);
    let mut tweak = u128::from_le_bytes(tweak.into());
    let mut tweaks = [0; SECTOR / BLOCK];
    for place in &mut tweaks {
        *place = tweak;
        // Times x modulo x^128 + x^7 + x^2 + x + 1.
        tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
    }
    mix(data, &tweaks);
    let (blocks, _) = InOutBuf::from(&mut *data).into_chunks::<U16>();
    if encrypt {
        data_key.encrypt_blocks_inout(blocks);
    } else {
        data_key.decrypt_blocks_inout(blocks);
    }
    mix(data, &tweaks);
}

fn mix(data: &mut [u8], tweaks: &[u128]) {
    for (block, tweak) in data.chunks_exact_mut(BLOCK).zip(tweaks) {
        let mut word = [0; BLOCK];
        word.copy_from_slice(block);
        block.copy_from_slice(&(u128::from_le_bytes(word) ^ tweak).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        text.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    fn check(algorithm: Algorithm, key: &str, unit: u64, plain: &[u8], start: &str, end: &str) {
        let xts = Xts::new(algorithm, &hex(key));
        let mut data = plain.to_vec();
        xts.unit(unit.into(), &mut data, true);
        assert!(data.starts_with(&hex(start)) && data.ends_with(&hex(end)), "{data:02x?}");
        xts.unit(unit.into(), &mut data, false);
        assert_eq!(data, plain);
    }

    /// IEEE 1619-2007, Annex B, vectors 1, 2, 4 and 10.
    #[test]
    fn the_standards_vectors_come_out() {
        let all: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let xts128 = Algorithm::AesXts128;
        let zeros = "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e";
        check(xts128, &"00".repeat(32), 0, &[0; 32], zeros, zeros);
        let fours = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        let key = "11".repeat(16) + &"22".repeat(16);
        check(xts128, &key, 0x33_3333_3333, &[0x44; 32], fours, fours);
        check(
            xts128,
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            &all,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
            "eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568",
        );
        check(
            Algorithm::AesXts256,
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
            0xff,
            &all,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
        );
    }

    #[test]
    fn each_sector_has_its_number_as_tweak() {
        let cipher = Dek::random(Algorithm::AesXts256).unwrap().cipher();
        let mut both = [7; 2 * SECTOR];
        cipher.encrypt(41, &mut both);
        let mut second = [7; SECTOR];
        cipher.encrypt(42, &mut second);
        assert_eq!(both[SECTOR..], second);
        assert_ne!(both[..SECTOR], second);
    }
}
