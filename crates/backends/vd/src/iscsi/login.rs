//! The login phase (RFC 7143, chapters 6, 11.12, 11.13 and 12): who we are, then what both can do. Pure: takes answers, makes requests.

use rustix::rand::GetRandomFlags;

use super::Fault;
use super::pdu::{self, FINAL, Header, IMMEDIATE, Pdu, request, response};
use super::settings::{Account, MOST, Target, split_address};
use super::text::{self, Text};

/// Whoever asks for more rounds does not mean to let us in.
const MOST_ROUNDS: u32 = 32;
/// A response's flag: the text goes on in the next one.
const CONTINUE: u8 = 0x40;
/// A challenge of ours has as many bytes as VirtualBox's least.
const CHALLENGE: usize = 16;

/// Stages, as bits 3..2 (current) and 1..0 (next) of the flags have them.
const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// What both sides do in the full-feature phase, beside what has only one value here: no digests, one connection, data in their order,
/// no recovery inside a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Most data of a PDU that the target takes.
    pub(super) send_data: u32,
    pub(super) max_burst: u32,
    pub(super) first_burst: u32,
    /// Data without R2T only as immediate ones.
    pub(super) initial_r2t: bool,
    pub(super) immediate_data: bool,
    pub(super) cmd_sn: u32,
    pub(super) exp_stat_sn: u32,
    pub(super) max_cmd_sn: u32,
}

/// What comes after an answer.
#[derive(Debug)]
pub(super) enum Step {
    /// This is to be sent.
    Send(Vec<u8>),
    Done(Agreed),
    /// The target is elsewhere: host and port.
    Moved(String, u16),
}

/// Where the negotiation is.
#[derive(Debug, PartialEq, Eq)]
enum Round {
    /// A method was asked for.
    Method,
    /// CHAP's algorithm was.
    Algorithm,
    /// Our proof was sent.
    Proof,
    /// Nothing to say any more in this stage but that we want to leave it.
    Leave,
    Operational,
}

pub(super) struct Login<'a> {
    target: &'a Target,
    isid: [u8; 6],
    initiator: String,
    round: Round,
    rounds: u32,
    collected: Vec<u8>,
    /// What the target has to prove, if anything: the identifier and challenge sent.
    challenge: Option<(u8, [u8; CHALLENGE])>,
    exp_stat_sn: u32,
    agreed: Agreed,
}

impl<'a> Login<'a> {
    pub(super) fn new(target: &'a Target, isid: [u8; 6], initiator: String) -> Self {
        // What holds where the target says nothing (RFC 7143, chapter 13), the careful way.
        let agreed = Agreed {
            send_data: 8192,
            max_burst: MOST,
            first_burst: 65536,
            initial_r2t: true,
            immediate_data: false,
            cmd_sn: 1,
            exp_stat_sn: 0,
            max_cmd_sn: 1,
        };
        Self {
            target,
            isid,
            initiator,
            round: Round::Method,
            rounds: 0,
            collected: Vec::new(),
            challenge: None,
            exp_stat_sn: 0,
            agreed,
        }
    }

    /// The first request.
    pub(super) fn start(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        text::put(&mut out, "InitiatorName", &self.initiator);
        text::put(&mut out, "TargetName", &self.target.name);
        text::put(&mut out, "SessionType", "Normal");
        if self.target.account.is_none() {
            text::put(&mut out, "AuthMethod", "None");
            return self.request(SECURITY, Some(OPERATIONAL), &out);
        }
        text::put(&mut out, "AuthMethod", "CHAP,None");
        self.request(SECURITY, None, &out)
    }

    fn request(&self, stage: u8, next: Option<u8>, text: &[u8]) -> Vec<u8> {
        let flags = stage << 2 | next.map_or(0, |next| FINAL | next);
        let mut header = Header::new(IMMEDIATE | request::LOGIN, flags);
        header.0[8..14].copy_from_slice(&self.isid);
        // One connection, number 0; the tag is that of the only task there is.
        let header = header.set_tag(1).set_word::<24>(self.agreed.cmd_sn).set_word::<28>(self.exp_stat_sn);
        let mut out = Vec::new();
        pdu::put(&mut out, header, text);
        out
    }

    /// Takes an answer.
    pub(super) fn answer(&mut self, pdu: &Pdu<'_>) -> Result<Step, Fault> {
        let header = &pdu.header;
        if header.opcode() != response::LOGIN {
            return Err(Fault::protocol(format!("it answers a login with opcode 0x{:02x}", header.opcode())));
        }
        self.rounds += 1;
        if self.rounds > MOST_ROUNDS || self.collected.len() + pdu.data.len() > text::LONGEST {
            return Err(Fault::protocol("its login does not come to an end"));
        }
        let (class, detail) = (header.0[36], header.0[37]);
        if class > 1 {
            return Err(Fault::Login { class, detail });
        }
        if header.0[3] != 0 {
            return Err(Fault::protocol(format!("it wants version {} of the protocol", header.0[3])));
        }
        self.exp_stat_sn = header.word::<24>().wrapping_add(1);
        self.agreed.max_cmd_sn = header.word::<32>();
        self.collected.extend_from_slice(pdu.data);
        let flags = header.flags();
        let stage = flags >> 2 & 3;
        if flags & CONTINUE != 0 && class == 0 {
            let own = if self.round == Round::Operational { OPERATIONAL } else { SECURITY };
            return Ok(Step::Send(self.request(own, None, &[])));
        }
        let text = Text::parse(&std::mem::take(&mut self.collected))?;
        if class == 1 {
            let moved = text.value("TargetAddress").and_then(split_address);
            let (host, port) = moved.ok_or_else(|| Fault::protocol("it has moved and does not say where"))?;
            return Ok(Step::Moved(host, port));
        }
        let next = (flags & FINAL != 0).then_some(flags & 3);
        if self.round == Round::Operational {
            if stage != OPERATIONAL {
                return Err(Fault::protocol("it falls back into an earlier stage of the login"));
            }
            return self.operational(&text, next);
        }
        if stage != SECURITY {
            return Err(Fault::protocol("it leaves out a stage of the login"));
        }
        self.take_limits(&text)?;
        self.security(&text, next)
    }

    fn security(&mut self, text: &Text, next: Option<u8>) -> Result<Step, Fault> {
        let method = text.value("AuthMethod");
        match (&self.round, &self.target.account) {
            (Round::Method, None) if method.is_some_and(|method| method != "None") => {
                return Err(Fault::NoAccount);
            }
            (Round::Method, Some(_)) if method == Some("CHAP") => {
                if next.is_some() {
                    return Err(Fault::protocol("it asks for CHAP and goes on without"));
                }
                self.round = Round::Algorithm;
                let mut out = Vec::new();
                // 5 is MD5.
                text::put(&mut out, "CHAP_A", "5");
                return Ok(Step::Send(self.request(SECURITY, None, &out)));
            }
            (Round::Algorithm, Some(account)) => {
                let out = self.prove(account, text)?;
                self.round = Round::Proof;
                return Ok(Step::Send(self.request(SECURITY, Some(OPERATIONAL), &out)));
            }
            (Round::Proof, _) => self.check_proof(text)?,
            // A target that has to prove who it is may not leave that out.
            _ if self.target.target_account.is_some() => return Err(Fault::NoProof),
            _ => {}
        }
        match next {
            Some(OPERATIONAL) => {
                self.round = Round::Operational;
                Ok(Step::Send(self.request(OPERATIONAL, Some(FULL_FEATURE), &offers())))
            }
            // It has nothing to agree on: then the defaults hold.
            Some(FULL_FEATURE) => Ok(Step::Done(self.done())),
            Some(_) => Err(Fault::protocol("it leads into a stage of the login that does not exist")),
            None => {
                self.round = Round::Leave;
                Ok(Step::Send(self.request(SECURITY, Some(OPERATIONAL), &[])))
            }
        }
    }

    fn prove(&self, account: &Account, text: &Text) -> Result<Vec<u8>, Fault> {
        let id = text.value("CHAP_I").and_then(|id| id.parse().ok());
        let challenge = text.value("CHAP_C").and_then(text::parse_binary);
        let (Some("5"), Some(id), Some(challenge)) = (text.value("CHAP_A"), id, challenge) else {
            return Err(Fault::protocol("it sends no challenge of CHAP with MD5"));
        };
        let mut out = Vec::new();
        text::put(&mut out, "CHAP_N", &account.name);
        text::put(&mut out, "CHAP_R", &text::hex(&text::chap_response(id, &account.secret, &challenge)));
        if let Some((id, challenge)) = &self.challenge {
            text::put(&mut out, "CHAP_I", &id.to_string());
            text::put(&mut out, "CHAP_C", &text::hex(challenge));
        }
        Ok(out)
    }

    /// Makes the challenge for the target, if it has to prove who it is. Before [`Login::start`].
    pub(super) fn challenge(mut self) -> Result<Self, Fault> {
        if self.target.target_account.is_some() {
            let mut random = [0; CHALLENGE + 1];
            let got = rustix::rand::getrandom(&mut random, GetRandomFlags::empty());
            if got.is_err() || got.is_ok_and(|got| got < random.len()) {
                return Err(Fault::Io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let [id, challenge @ ..] = random;
            self.challenge = Some((id, challenge));
        }
        Ok(self)
    }

    /// Whether the target has proved who it is, where it has to.
    fn check_proof(&self, text: &Text) -> Result<(), Fault> {
        let Some(account) = &self.target.target_account else { return Ok(()) };
        let response = text.value("CHAP_R").and_then(text::parse_binary);
        let proved = self.challenge.as_ref().is_some_and(|(id, challenge)| {
            response.is_some_and(|r| r == text::chap_response(*id, &account.secret, challenge))
        });
        if proved && text.value("CHAP_N") == Some(&account.name) { Ok(()) } else { Err(Fault::NoProof) }
    }

    fn operational(&mut self, text: &Text, next: Option<u8>) -> Result<Step, Fault> {
        self.take_limits(text)?;
        if next == Some(FULL_FEATURE) {
            return Ok(Step::Done(self.done()));
        }
        // What it asks beyond our offers gets an answer; every key that we know was among them, or is not to be answered.
        let mut out = Vec::new();
        for (key, value) in text.pairs() {
            let answered = matches!(value, "NotUnderstood" | "Reject" | "Irrelevant");
            if !answered && !OFFERS.iter().any(|(known, _)| *known == key) && !DECLARED.contains(&key) {
                text::put(&mut out, key, "NotUnderstood");
            }
        }
        // An answer in one PDU; more than that would be an attack.
        out.truncate(8192);
        Ok(Step::Send(self.request(OPERATIONAL, Some(FULL_FEATURE), &out)))
    }

    fn take_limits(&mut self, text: &Text) -> Result<(), Fault> {
        let number = |key: &str| -> Result<Option<u32>, Fault> {
            let parse = |value: &str| match value {
                "Irrelevant" | "NotUnderstood" | "Reject" => Ok(None),
                value => match value.parse() {
                    Ok(number @ 512..=0x00ff_ffff) => Ok(Some(number)),
                    _ => Err(Fault::protocol(format!("its {key} is '{value}'"))),
                },
            };
            text.value(key).map_or(Ok(None), parse)
        };
        let agreed = &mut self.agreed;
        agreed.send_data = number("MaxRecvDataSegmentLength")?.unwrap_or(agreed.send_data);
        agreed.max_burst = number("MaxBurstLength")?.unwrap_or(agreed.max_burst).min(MOST);
        agreed.first_burst = number("FirstBurstLength")?.unwrap_or(agreed.first_burst).min(agreed.max_burst);
        if let Some(value) = text.value("InitialR2T") {
            agreed.initial_r2t = value != "No";
        }
        if let Some(value) = text.value("ImmediateData") {
            agreed.immediate_data = value == "Yes";
        }
        for (key, only) in [
            ("HeaderDigest", "None"),
            ("DataDigest", "None"),
            ("DataPDUInOrder", "Yes"),
            ("DataSequenceInOrder", "Yes"),
        ] {
            if let Some(value) = text.value(key).filter(|value| *value != only) {
                return Err(Fault::protocol(format!("it insists on {key}={value}; set it to {only} there")));
            }
        }
        Ok(())
    }

    fn done(&self) -> Agreed {
        Agreed { exp_stat_sn: self.exp_stat_sn, ..self.agreed }
    }
}

/// What we offer, with VirtualBox's values.
const OFFERS: [(&str, &str); 14] = [
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("MaxConnections", "1"),
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
    ("MaxRecvDataSegmentLength", "262144"),
    ("MaxBurstLength", "262144"),
    ("FirstBurstLength", "262144"),
    ("DefaultTime2Wait", "0"),
    // Nothing of a lost session is taken up again: its commands are given anew.
    ("DefaultTime2Retain", "0"),
    ("DataPDUInOrder", "Yes"),
    ("DataSequenceInOrder", "Yes"),
    ("ErrorRecoveryLevel", "0"),
    ("MaxOutstandingR2T", "1"),
];

/// Keys that a target says without asking anything.
const DECLARED: [&str; 5] =
    ["TargetAlias", "TargetAddress", "TargetPortalGroupTag", "AuthMethod", "SessionType"];

fn offers() -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in OFFERS {
        text::put(&mut out, key, value);
    }
    out
}
