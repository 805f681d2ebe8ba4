//! Texts of the login phase (RFC 7143, chapter 6) and CHAP with MD5 (RFC 1994).

use base64::Engine as _;
use md5::{Digest, Md5};

use super::Fault;

/// Longest text of one answer, over all its PDUs.
pub(super) const LONGEST: usize = 65536;
/// RFC 7143 12.1.3: challenges have up to 1024 bytes.
const LONGEST_CHALLENGE: usize = 1024;
const MOST_KEYS: usize = 256;

/// Pairs of keys and values, in their order.
#[derive(Debug, Default)]
pub(super) struct Text(Vec<(String, String)>);

impl Text {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let mut pairs = Vec::new();
        for pair in bytes.split(|b| *b == 0).filter(|pair| !pair.is_empty()) {
            let pair = std::str::from_utf8(pair).ok().and_then(|pair| pair.split_once('='));
            let Some((key, value)) = pair else {
                return Err(Fault::protocol("its login text is no list of keys and values"));
            };
            if pairs.len() == MOST_KEYS {
                return Err(Fault::protocol("its login text has too many keys"));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self(pairs))
    }

    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

/// Appends a pair.
pub(super) fn put(out: &mut Vec<u8>, key: &str, value: &str) {
    for part in [key, "=", value, "\0"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// A binary value: hexadecimal behind `0x`, base64 behind `0b`.
pub(super) fn parse_binary(text: &str) -> Option<Vec<u8>> {
    if text.len() > 2 + 2 * LONGEST_CHALLENGE {
        return None;
    }
    let (form, digits) = text.split_at_checked(2)?;
    let bytes = match form {
        "0x" | "0X" => {
            // A leading zero may be left out.
            let padded = if digits.len() % 2 == 1 { format!("0{digits}") } else { digits.to_owned() };
            let pair = |pair: &[u8]| {
                let pair =
                    std::str::from_utf8(pair).ok().filter(|p| p.bytes().all(|b| b.is_ascii_hexdigit()))?;
                u8::from_str_radix(pair, 16).ok()
            };
            padded.as_bytes().chunks(2).map(pair).collect::<Option<Vec<u8>>>()?
        }
        "0b" | "0B" => base64::engine::general_purpose::STANDARD.decode(digits).ok()?,
        _ => return None,
    };
    (!bytes.is_empty() && bytes.len() <= LONGEST_CHALLENGE).then_some(bytes)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// What proves that one knows the secret.
pub(super) fn chap_response(id: u8, secret: &[u8], challenge: &[u8]) -> [u8; 16] {
    Md5::new().chain_update([id]).chain_update(secret).chain_update(challenge).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_lists_of_pairs() {
        let mut bytes = Vec::new();
        put(&mut bytes, "A", "1,2");
        put(&mut bytes, "B", "x=y");
        let text = Text::parse(&bytes).unwrap();
        assert_eq!((text.value("A"), text.value("B"), text.value("C")), (Some("1,2"), Some("x=y"), None));
        assert_eq!(text.pairs().count(), 2);
        assert!(Text::parse(b"\0\0").unwrap().0.is_empty());
        assert!(Text::parse(b"novalue\0").is_err() && Text::parse(b"\xff=1\0").is_err());
        assert!(Text::parse("a=b\0".repeat(257).as_bytes()).is_err());
    }

    #[test]
    fn binary_values_have_two_forms() {
        assert_eq!(parse_binary("0x00fF"), Some(vec![0, 255]));
        assert_eq!(parse_binary("0xabc"), Some(vec![0x0a, 0xbc]));
        assert_eq!(parse_binary("0bAP8="), Some(vec![0, 255]));
        for bad in ["", "0", "0x", "0b", "12", "0xg0", "0x+1", "0b!", "äb"] {
            assert_eq!(parse_binary(bad), None, "{bad}");
        }
        assert_eq!(parse_binary(&format!("0x{}", "00".repeat(1025))), None);
    }

    /// From Python: `hashlib.md5(b'\x27' + b'secret' + bytes(range(16))).hexdigest()`.
    #[test]
    fn responses_are_the_hash_of_identifier_secret_and_challenge() {
        let challenge: Vec<u8> = (0..16).collect();
        assert_eq!(hex(&chap_response(0x27, b"secret", &challenge)), "0xe13322b3768e8f436d297533b6c30ed4");
    }
}
