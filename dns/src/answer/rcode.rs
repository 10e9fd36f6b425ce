//! Response codes (RFC 6895), as far as they are given or passed on here.

/// A response code; those above 15 have their upper bits in the OPT record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    YxDomain = 6,
    YxRrset = 7,
    NxRrset = 8,
    NotAuth = 9,
    NotZone = 10,
    /// Any other that an upstream gave.
    Other = 15,
    BadVers = 16,
}

impl Rcode {
    pub const ALL: [Rcode; 13] = [
        Rcode::NoError,
        Rcode::FormErr,
        Rcode::ServFail,
        Rcode::NxDomain,
        Rcode::NotImp,
        Rcode::Refused,
        Rcode::YxDomain,
        Rcode::YxRrset,
        Rcode::NxRrset,
        Rcode::NotAuth,
        Rcode::NotZone,
        Rcode::Other,
        Rcode::BadVers,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Rcode::NoError => "NOERROR",
            Rcode::FormErr => "FORMERR",
            Rcode::ServFail => "SERVFAIL",
            Rcode::NxDomain => "NXDOMAIN",
            Rcode::NotImp => "NOTIMP",
            Rcode::Refused => "REFUSED",
            Rcode::YxDomain => "YXDOMAIN",
            Rcode::YxRrset => "YXRRSET",
            Rcode::NxRrset => "NXRRSET",
            Rcode::NotAuth => "NOTAUTH",
            Rcode::NotZone => "NOTZONE",
            Rcode::Other => "OTHER",
            Rcode::BadVers => "BADVERS",
        }
    }

    /// The code in a message's header.
    pub fn of(message: &[u8]) -> Self {
        let bits = message.get(3).map_or(2, |flags| flags & 0x0f);
        let known = Rcode::ALL.into_iter().find(|code| *code as u8 == bits);
        known.unwrap_or(Rcode::Other)
    }

    /// Its place in [`Rcode::ALL`].
    pub fn index(self) -> usize {
        Rcode::ALL
            .iter()
            .position(|code| *code == self)
            .unwrap_or_default()
    }
}
