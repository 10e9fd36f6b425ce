//! FakeRuntime: sandboxes and containers that are entries of a list.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use k8s_cri::v1::{AuthConfig, ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use keelway_kubelet::clock::Clock;
use keelway_kubelet::runtime::{
    ANNOTATION_BACKOFF, ANNOTATION_IMAGE, ANNOTATION_LIMITS, ContainerPhase, ContainerView,
    ExecOutput, ExitSource, FailureKind, ImageView, KnownPod, PodView, Runtime, RuntimeError,
    RuntimeStatus, SandboxView, StreamRequest,
};

type Announce = Box<dyn Fn(&str) + Send + Sync>;

#[derive(Default)]
struct State {
    /// With the uid of their pod.
    sandboxes: Vec<(String, SandboxView)>,
    containers: Vec<(String, ContainerView)>,
    images: BTreeSet<String>,
    calls: Vec<String>,
    made: u32,
    exec_result: i32,
    written_bytes: u64,
}

pub struct FakeRuntime {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    announce: Announce,
}

impl FakeRuntime {
    pub fn new(clock: Arc<dyn Clock>, announce: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let state = State {
            images: BTreeSet::from(["img:1".to_owned()]),
            ..Default::default()
        };
        Self {
            state: Mutex::new(state),
            clock,
            announce: Box::new(announce),
        }
    }

    fn now_ns(&self) -> i64 {
        i64::try_from(self.clock.now().as_nanosecond()).unwrap()
    }

    fn call(&self, text: String) {
        self.state.lock().unwrap().calls.push(text);
    }

    /// What was done so far; looks are not counted.
    pub fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }

    pub fn forget_calls(&self) {
        self.state.lock().unwrap().calls.clear();
    }

    pub fn is_running(&self, name: &str) -> bool {
        let state = self.state.lock().unwrap();
        state
            .containers
            .iter()
            .any(|(_, c)| c.name == name && c.phase == ContainerPhase::Running)
    }

    pub fn attempt(&self, name: &str) -> Option<u32> {
        let state = self.state.lock().unwrap();
        state
            .containers
            .iter()
            .filter(|(_, c)| c.name == name)
            .map(|(_, c)| c.attempt)
            .max()
    }

    pub fn is_empty(&self) -> bool {
        let state = self.state.lock().unwrap();
        state.sandboxes.is_empty() && state.containers.is_empty()
    }

    pub fn import(&self, image: &str) {
        self.state.lock().unwrap().images.insert(image.to_owned());
    }

    pub fn set_exec_result(&self, exit_code: i32) {
        self.state.lock().unwrap().exec_result = exit_code;
    }

    /// What each container has written to its own file system from now on.
    pub fn set_written_bytes(&self, bytes: u64) {
        self.state.lock().unwrap().written_bytes = bytes;
    }

    /// Ends the running container of this name by itself.
    pub fn exit(&self, name: &str, exit_code: i32) {
        let id = {
            let state = self.state.lock().unwrap();
            let running = state
                .containers
                .iter()
                .find(|(_, c)| c.name == name && c.phase == ContainerPhase::Running);
            running.unwrap().1.id.clone()
        };
        self.end(&id, exit_code);
    }

    fn end(&self, id: &str, exit_code: i32) {
        let now = self.now_ns();
        for (_, container) in self
            .state
            .lock()
            .unwrap()
            .containers
            .iter_mut()
            .filter(|(_, c)| c.id == id)
        {
            if container.phase == ContainerPhase::Running {
                container.phase = ContainerPhase::Exited;
                container.exit_code = exit_code;
                container.finished_at_ns = now;
            }
        }
        (self.announce)(id);
    }

    fn name_of(&self, id: &str) -> String {
        let state = self.state.lock().unwrap();
        state
            .containers
            .iter()
            .find(|(_, c)| c.id == id)
            .map_or("?".to_owned(), |(_, c)| c.name.clone())
    }

    fn new_id(&self, kind: &str) -> String {
        let mut state = self.state.lock().unwrap();
        state.made += 1;
        format!("{kind}{}", state.made)
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn version(&self) -> Result<String, RuntimeError> {
        Ok("fake://1".to_owned())
    }

    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        Ok(RuntimeStatus {
            ready: true,
            network_ready: true,
            ..Default::default()
        })
    }

    async fn known_pods(&self) -> Result<Vec<KnownPod>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn observe(&self, pod_uid: &str) -> Result<PodView, RuntimeError> {
        let state = self.state.lock().unwrap();
        let sandboxes = state
            .sandboxes
            .iter()
            .rev()
            .filter(|(uid, _)| uid == pod_uid)
            .map(|(_, s)| s.clone());
        let mut containers: Vec<_> = state
            .containers
            .iter()
            .filter(|(uid, _)| uid == pod_uid)
            .map(|(_, c)| c.clone())
            .collect();
        containers.sort_by_key(|c| std::cmp::Reverse(c.attempt));
        Ok(PodView {
            sandboxes: sandboxes.collect(),
            containers,
        })
    }

    async fn run_sandbox(
        &self,
        config: PodSandboxConfig,
        handler: &str,
    ) -> Result<String, RuntimeError> {
        let metadata = config.metadata.unwrap();
        let by = match handler {
            "" => String::new(),
            handler => format!(" by {handler}"),
        };
        self.call(format!("run sandbox {}{by}", metadata.name));
        let id = self.new_id("sandbox");
        let ips = vec!["10.0.0.1".to_owned()];
        let view = SandboxView {
            id: id.clone(),
            attempt: metadata.attempt,
            ready: true,
            created_at_ns: self.now_ns(),
            ips,
        };
        self.state
            .lock()
            .unwrap()
            .sandboxes
            .push((metadata.uid, view));
        Ok(id)
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        self.call("stop sandbox".to_owned());
        for (_, sandbox) in self
            .state
            .lock()
            .unwrap()
            .sandboxes
            .iter_mut()
            .filter(|(_, s)| s.id == id)
        {
            sandbox.ready = false;
        }
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        self.call("remove sandbox".to_owned());
        let mut state = self.state.lock().unwrap();
        state.sandboxes.retain(|(_, s)| s.id != id);
        state.containers.retain(|(_, c)| c.sandbox_id != id);
        Ok(())
    }

    async fn images(&self) -> Result<Vec<ImageView>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn image(&self, name: &str) -> Result<Option<ImageView>, RuntimeError> {
        let known = self.state.lock().unwrap().images.contains(name);
        Ok(known.then(|| ImageView {
            id: format!("sha256:{name}"),
            ..Default::default()
        }))
    }

    async fn pull(
        &self,
        name: &str,
        auth: Option<AuthConfig>,
        _: PodSandboxConfig,
    ) -> Result<(), RuntimeError> {
        let by = auth.map_or(String::new(), |auth| format!(" as {}", auth.username));
        self.call(format!("pull {name}{by}"));
        // What was imported is what the registry has.
        match self.image(name).await? {
            Some(_) => Ok(()),
            None => Err(RuntimeError::Call {
                operation: "PullImage",
                message: "not found".to_owned(),
                kind: FailureKind::NotFound,
            }),
        }
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        _: PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let metadata = config.metadata.unwrap();
        self.call(format!("create {} {}", metadata.name, metadata.attempt));
        let id = self.new_id("container");
        let view = ContainerView {
            id: id.clone(),
            name: metadata.name,
            attempt: metadata.attempt,
            sandbox_id: sandbox_id.to_owned(),
            phase: ContainerPhase::Created,
            created_at_ns: self.now_ns(),
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            image: "img:1".to_owned(),
            image_id: config.image.unwrap().image,
            spec_image: config.annotations[ANNOTATION_IMAGE].clone(),
            backoff_s: config.annotations[ANNOTATION_BACKOFF].parse().unwrap(),
            limits: config.annotations[ANNOTATION_LIMITS].clone(),
            log_path: String::new(),
        };
        let mut state = self.state.lock().unwrap();
        let uid = state
            .sandboxes
            .iter()
            .find(|(_, s)| s.id == sandbox_id)
            .unwrap()
            .0
            .clone();
        state.containers.push((uid, view));
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        self.call(format!("start {}", self.name_of(id)));
        let now = self.now_ns();
        for (_, container) in self
            .state
            .lock()
            .unwrap()
            .containers
            .iter_mut()
            .filter(|(_, c)| c.id == id)
        {
            container.phase = ContainerPhase::Running;
            container.started_at_ns = now;
        }
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace_s: i64) -> Result<(), RuntimeError> {
        self.call(format!("stop {} {grace_s}", self.name_of(id)));
        self.end(id, 0);
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        self.state
            .lock()
            .unwrap()
            .containers
            .retain(|(_, c)| c.id != id);
        Ok(())
    }

    async fn resize_container(
        &self,
        id: &str,
        resources: LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let (quota, memory) = (resources.cpu_quota, resources.memory_limit_in_bytes);
        self.call(format!("resize {} {quota} {memory}", self.name_of(id)));
        Ok(())
    }

    async fn exec(&self, _: &str, _: Vec<String>, _: i64) -> Result<ExecOutput, RuntimeError> {
        Ok(ExecOutput {
            exit_code: self.state.lock().unwrap().exec_result,
            output: String::new(),
        })
    }

    async fn reopen_log(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }

    async fn written_bytes(&self, _: &str) -> Result<u64, RuntimeError> {
        Ok(self.state.lock().unwrap().written_bytes)
    }

    async fn stream_url(&self, _: StreamRequest) -> Result<String, RuntimeError> {
        Err(RuntimeError::Call {
            operation: "Exec",
            message: "no streams here".to_owned(),
            kind: FailureKind::Unimplemented,
        })
    }

    async fn changes(&self) -> Result<(ExitSource, BoxStream<'static, String>), RuntimeError> {
        Ok((ExitSource::Relist, Box::pin(futures::stream::pending())))
    }
}
