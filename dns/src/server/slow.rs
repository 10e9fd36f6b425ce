//! What takes more than a look: other servers are asked, answers put together of several, names found under another one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{DNSClass, Name as ProtoName, RData, Record, rdata::CNAME};

use super::{REPLY_BYTES_MAX, Shared, State};
use crate::answer::{CNAMES_MAX, Policy, Rcode, Transport, Verdict, accept, answer, failure, room};
use crate::autopath;
use crate::cache::Entry;
use crate::fetch::{code_of, fetch};
use crate::forward::{ForwardError, Question};
use crate::name::Name;
use crate::query::{HEADER_BYTES, Query, class, rtype};
use crate::rewrite::rewrite;
use crate::settings::Block;

/// An answer in parts, as it is put together.
struct Looked {
    message: Message,
    /// The code of the last name of a chain.
    rcode: ResponseCode,
}

/// What is to be said.
enum Found {
    Entry(Arc<Entry>),
    Looked(Box<Looked>),
}

/// One slow query, with the state of the moment when it came.
pub(super) struct Slow {
    pub shared: Arc<Shared>,
    pub state: Arc<State>,
    pub client: SocketAddr,
    pub transport: Transport,
}

impl Slow {
    pub fn of(shared: &Arc<Shared>, client: SocketAddr, transport: Transport) -> Self {
        Self {
            state: shared.state.load_full(),
            shared: shared.clone(),
            client,
            transport,
        }
    }

    /// The reply to a message; `None` when there is nothing to say.
    pub async fn resolve(&self, message: &[u8]) -> Option<Vec<u8>> {
        // Nothing large is held while others are waited for: thousands may wait.
        let looked = match self.look(message).await {
            Ok(looked) => looked,
            Err(reply) => return reply,
        };
        let mut out = match self.transport {
            Transport::Udp => vec![0; REPLY_BYTES_MAX],
            Transport::Tcp => vec![0; usize::from(u16::MAX)],
        };
        let verdict = self.reply(message, looked, &mut out);
        let Verdict::Reply { bytes, .. } = verdict else {
            return None;
        };
        out.truncate(bytes);
        out.shrink_to_fit();
        Some(out)
    }

    /// What is to be said to a message, or the reply that needs no more than a few bytes.
    async fn look(&self, message: &[u8]) -> Result<Found, Option<Vec<u8>>> {
        let small = |answer: &dyn Fn(&mut [u8]) -> Verdict| {
            let mut out = [0; 512];
            match answer(&mut out) {
                Verdict::Reply { bytes, .. } => Some(out[..bytes].to_vec()),
                _ => None,
            }
        };
        let refused = |policy: &Policy| small(&|out| failure(policy, message, Rcode::Refused, out));
        let bare = &self.shared.bare;
        let Ok(query) = Query::parse(message) else {
            return Err(small(&|out| {
                accept(message, bare, out).err().unwrap_or(Verdict::Ignore)
            }));
        };
        let Some(block) = self.state.settings.block(query.name()) else {
            return Err(refused(bare));
        };
        if query.rtype == rtype::HINFO && self.shared.probes.came_back(query.name()) {
            return Err(refused(&block.policy));
        }
        let asked = Name::from_wire(query.name());
        let new = rewrite(&block.spec.rewrites, &asked);
        let name = new.as_ref().unwrap_or(&asked);
        let question = Question {
            name: name.wire().to_vec(),
            rtype: query.rtype,
            dnssec_ok: query.dnssec_ok(),
            checking_disabled: query.checking_disabled,
        };
        let looked = if new.is_none() && !self.is_ours(block, &query) {
            // The usual case: bytes from the cache or an upstream, copied.
            match fetch(block, &self.shared.metrics, &question, self.client.ip()).await {
                Ok(entry) => return Ok(Found::Entry(entry)),
                Err(error) => Err(error),
            }
        } else {
            self.look_up(question.clone()).await
        };
        let failed = |error: &ForwardError| {
            small(&|out| failure(&block.policy, message, code_of(error), out))
        };
        let mut looked = looked.map_err(|error| failed(&error))?;
        if looked.rcode == ResponseCode::NXDomain
            && let Some(found) = self.follow_path(block, &question).await
        {
            looked = found;
        }
        if let (Some(new), Some(asked)) = (&new, proto_name(&asked)) {
            looked.rename(new, &asked);
        }
        Ok(Found::Looked(Box::new(looked)))
    }

    fn reply(&self, message: &[u8], found: Found, out: &mut [u8]) -> Verdict {
        let Ok(query) = Query::parse(message) else {
            return Verdict::Ignore;
        };
        let block = self.state.settings.block(query.name());
        let policy = block.map_or(&self.shared.bare, |block| &block.policy);
        match found {
            Found::Entry(entry) => {
                let (turn, now) = (self.shared.turn(), Instant::now());
                entry.compose(&query, policy, self.transport, now, turn, out)
            }
            Found::Looked(looked) => looked.finish(message, &query, policy, self.transport, out),
        }
    }

    /// Whether the zone or the hosts have something to say about the name.
    fn is_ours(&self, block: &Block, query: &Query<'_>) -> bool {
        let cluster = block.spec.cluster.is_some() && self.state.zone.place(query.name()).is_some();
        let mut out = [0; 512];
        let mut elsewhere = || {
            let verdict = answer(
                &self.state.zone,
                &block.policy,
                query,
                Transport::Udp,
                0,
                &mut out,
            );
            verdict == Verdict::Elsewhere
        };
        cluster && !elsewhere()
    }

    /// Looks a name up, and what its aliases lead to.
    async fn look_up(&self, question: Question) -> Result<Looked, Arc<ForwardError>> {
        let mut whole: Option<Looked> = None;
        let mut question = question;
        for _ in 0..CNAMES_MAX {
            let (part, next) = match self.look_up_here(&question) {
                Some(found) => found,
                None => {
                    let asked = self.ask_others(&question).await;
                    match (asked, &whole) {
                        (Ok(part), _) => (part, None),
                        // The alias is known, only its target is not: that is a failure, not "no data".
                        (Err(error), _) => return Err(error),
                    }
                }
            };
            match &mut whole {
                None => whole = Some(part),
                Some(whole) => whole.extend(part),
            }
            match next {
                Some(target) => question.name = target.wire().to_vec(),
                None => break,
            }
        }
        whole.ok_or_else(|| Arc::new(ForwardError::NoRoute))
    }

    /// What the hosts and the zone know of a name, and the name that an alias leads to elsewhere.
    fn look_up_here(&self, question: &Question) -> Option<(Looked, Option<Name>)> {
        let block = self.state.settings.block(&question.name)?;
        let mut wire = vec![0; HEADER_BYTES];
        wire[5] = 1;
        wire.extend_from_slice(&question.name);
        wire.extend_from_slice(&question.rtype.to_be_bytes());
        wire.extend_from_slice(&class::IN.to_be_bytes());
        let query = Query::parse(&wire).ok()?;
        let mut out = vec![0; usize::from(u16::MAX)];
        let hosts = block.spec.hosts.as_ref();
        let hosts =
            hosts.map(|hosts| hosts.answer(&block.policy, &query, Transport::Tcp, &mut out));
        let verdict = match hosts {
            Some(verdict @ Verdict::Reply { .. }) => verdict,
            _ if block.spec.cluster.is_some() => {
                let turn = self.shared.turn();
                answer(
                    &self.state.zone,
                    &block.policy,
                    &query,
                    Transport::Tcp,
                    turn,
                    &mut out,
                )
            }
            _ => Verdict::Elsewhere,
        };
        let (bytes, next) = match verdict {
            Verdict::Reply { bytes, .. } => (bytes, None),
            Verdict::Chase { bytes, target } => (bytes, Some(target)),
            Verdict::Elsewhere | Verdict::Ignore => return None,
        };
        let message = Message::from_vec(&out[..bytes]).ok()?;
        Some((Looked::of(message), next))
    }

    async fn ask_others(&self, question: &Question) -> Result<Looked, Arc<ForwardError>> {
        let no_route = || Arc::new(ForwardError::NoRoute);
        let block = self
            .state
            .settings
            .block(&question.name)
            .ok_or_else(no_route)?;
        let entry = fetch(block, &self.shared.metrics, question, self.client.ip()).await?;
        let mut asked = question.name.clone();
        asked.extend(question.rtype.to_be_bytes());
        asked.extend(class::IN.to_be_bytes());
        let message = entry.message(&asked, Instant::now());
        let message = message.map_err(|source| {
            Arc::new(ForwardError::Reply {
                server: self.client,
                source,
            })
        })?;
        Ok(Looked::of(message))
    }

    /// Follows the client's search path, where that is safe.
    async fn follow_path(&self, block: &Block, question: &Question) -> Option<Looked> {
        let spec = block.spec.autopath.as_ref()?;
        spec.is_about(&question.name).then_some(())?;
        let client: IpAddr = self.client.ip();
        let (rest, origin) =
            autopath::rest(&self.state.zone, &question.name, question.rtype, client)?;
        let mut no_data = None;
        for candidate in autopath::candidates(rest, origin, &spec.search) {
            let next = Question {
                name: candidate.wire().to_vec(),
                ..question.clone()
            };
            // What can't be asked is left to the client, which will ask it itself.
            let found = Box::pin(self.look_up(next)).await.ok()?;
            match found.rcode {
                ResponseCode::NXDomain => {}
                ResponseCode::NoError => {
                    let has_data = found
                        .message
                        .answers
                        .iter()
                        .any(|record| u16::from(record.record_type()) == question.rtype);
                    let aliased =
                        found.behind(&Name::from_wire(&question.name), &candidate, block)?;
                    if has_data {
                        return Some(aliased);
                    }
                    // It exists, but has no address of this family; another domain of the path may.
                    no_data.get_or_insert(aliased);
                }
                _ => return None,
            }
        }
        no_data
    }
}

impl Looked {
    fn of(message: Message) -> Self {
        Self {
            rcode: message.metadata.response_code,
            message,
        }
    }

    fn extend(&mut self, part: Looked) {
        self.rcode = part.rcode;
        let mine = &mut self.message;
        mine.metadata.authentic_data &= part.message.metadata.authentic_data;
        mine.metadata.truncation |= part.message.metadata.truncation;
        mine.answers.extend(part.message.answers);
        mine.authorities = part.message.authorities;
        mine.additionals.extend(part.message.additionals);
    }

    /// This answer, with an alias from `asked` in front.
    fn behind(mut self, asked: &Name, found: &Name, block: &Block) -> Option<Self> {
        let target = RData::CNAME(CNAME(proto_name(found)?));
        let mut alias = Record::from_rdata(proto_name(asked)?, block.policy.ttl_s, target);
        alias.dns_class = DNSClass::IN;
        self.message.answers.insert(0, alias);
        Some(self)
    }

    /// Gives the records of a name that was found under another one the name that was asked for.
    fn rename(&mut self, found: &Name, asked: &ProtoName) {
        let Some(found) = proto_name(found) else {
            return;
        };
        for record in &mut self.message.answers {
            if record.name == found {
                record.name = asked.clone();
            }
        }
    }

    fn finish(
        self,
        asked: &[u8],
        query: &Query<'_>,
        policy: &Policy,
        transport: Transport,
        out: &mut [u8],
    ) -> Verdict {
        let rcode = match self.rcode {
            ResponseCode::NoError => Rcode::NoError,
            ResponseCode::NXDomain => Rcode::NxDomain,
            ResponseCode::Refused => Rcode::Refused,
            _ => Rcode::ServFail,
        };
        let room = room(query, policy, transport, out);
        let Ok(client) = Message::from_vec(asked) else {
            return failure(policy, asked, Rcode::FormErr, out);
        };
        let mut message = self.message;
        let authentic =
            message.metadata.authentic_data && (query.dnssec_ok() || query.authentic_data);
        let (truncated, authoritative) =
            (message.metadata.truncation, message.metadata.authoritative);
        message.metadata = client.metadata;
        message.metadata.truncation = truncated;
        message.metadata.authoritative = authoritative;
        message.metadata.message_type = hickory_proto::op::MessageType::Response;
        message.metadata.recursion_available = policy.recursion;
        message.metadata.authentic_data = authentic;
        message.metadata.response_code = self.rcode;
        message.queries = client.queries;
        message.edns = query.edns.map(|edns| {
            let mut opt = hickory_proto::op::Edns::new();
            opt.set_max_payload(policy.udp_bytes_max.min(usize::from(u16::MAX)) as u16);
            opt.set_dnssec_ok(edns.dnssec_ok);
            opt
        });
        loop {
            match message.to_vec() {
                Ok(wire) if wire.len() <= room => {
                    out[..wire.len()].copy_from_slice(&wire);
                    let bytes = wire.len();
                    return Verdict::Reply { bytes, rcode };
                }
                Ok(_) if !message.additionals.is_empty() => message.additionals.clear(),
                Ok(_) if !message.answers.is_empty() || !message.authorities.is_empty() => {
                    message.metadata.truncation = true;
                    message.authorities.clear();
                    let half = message.answers.len() / 2;
                    message.answers.truncate(half);
                }
                _ => return failure(policy, asked, Rcode::ServFail, out),
            }
        }
    }
}

fn proto_name(name: &Name) -> Option<ProtoName> {
    let labels = name
        .and_ancestors()
        .filter(|wire| wire.len() > 1)
        .map(|wire| &wire[1..=usize::from(wire[0])]);
    ProtoName::from_labels(labels).ok()
}
