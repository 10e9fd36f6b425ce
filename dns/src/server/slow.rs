//! What takes more than a look: other servers are asked, answers put together of several, names found under another one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::{Message, ResponseCode};

use super::looked::{Looked, proto_name};
use super::{REPLY_BYTES_MAX, Shared, State};
use crate::answer::{CNAMES_MAX, Policy, Rcode, Transport, Verdict, accept, answer, failure};
use crate::autopath;
use crate::cache::Entry;
use crate::fetch::{code_of, fetch};
use crate::forward::{ForwardError, Question};
use crate::name::Name;
use crate::query::{HEADER_BYTES, Query, class, rtype};
use crate::rewrite::rewrite;
use crate::settings::Block;

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
        let mut passed = Vec::new();
        for _ in 0..CNAMES_MAX {
            if passed.contains(&question.name) {
                // An alias that leads back: all of it has been told.
                break;
            }
            passed.push(question.name.clone());
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
                    let aliased = found.behind(
                        &Name::from_wire(&question.name),
                        &candidate,
                        block.policy.ttl_s,
                    )?;
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
