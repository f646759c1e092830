BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0004');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	created_at FLOAT NOT NULL, user_id VARCHAR(40) DEFAULT 'user_first' NOT NULL, hint VARCHAR(16) DEFAULT '' NOT NULL, scopes JSON DEFAULT '["read", "write", "admin"]' NOT NULL, expires_at FLOAT, revoked_at FLOAT, used_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
CREATE TABLE artifacts (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE attempts (
	job_id VARCHAR(40) NOT NULL, 
	n INTEGER NOT NULL, 
	token VARCHAR(40) NOT NULL, 
	submission_id VARCHAR(80) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	events_offset BIGINT NOT NULL, 
	created_at FLOAT NOT NULL, 
	ended_at FLOAT, 
	PRIMARY KEY (job_id, n), 
	FOREIGN KEY(job_id) REFERENCES jobs (id), 
	UNIQUE (submission_id)
);
INSERT INTO "attempts" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',1,'run_AU8aw1OvtBeciB-_T2ILnHS20vfKQXFS','job-ftjob_01M8D3656RP38Y4J32HPFRRG9Q-a1','settled',20,1.79573588503361034388e+09,1.79573588506013846399e+09);
INSERT INTO "attempts" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',1,'run_hGdkBbF2J3xKXKfpFcdCaLIPt64qpeja','job-ftjob_01M8D3658FE21H7AANC7FQQGQV-a1','submitted',10,1.79573588507512950894e+09,NULL);
CREATE TABLE checkpoints (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	attempt INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE datasets (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	uri TEXT NOT NULL, 
	summary JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE deliveries (
	id VARCHAR(40) NOT NULL, 
	webhook_id VARCHAR(40) NOT NULL, 
	body JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	tries INTEGER NOT NULL, 
	next_at FLOAT NOT NULL, 
	last_error TEXT, 
	created_at FLOAT NOT NULL, 
	sent_at FLOAT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(webhook_id) REFERENCES webhooks (id)
);
CREATE TABLE events (
	job_id VARCHAR(40) NOT NULL, 
	seq INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	run_seq BIGINT, 
	type VARCHAR(40) NOT NULL, 
	level VARCHAR(10) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, seq), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "events" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79573588501612210277e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79573588501612210277e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79573588503374290464e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',4,1,10,'job.status','info','planning → running','{"from": "planning", "to": "running"}',1.7957358850540587902e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q',5,1,20,'job.status','info','running → succeeded','{"from": "running", "to": "succeeded"}',1.79573588506002235418e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79573588507094478606e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79573588507094478606e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79573588507521772388e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.79573588507798647881e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV',5,1,10,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1.79573588508383917812e+09);
INSERT INTO "events" VALUES('sweep_01M8D365957HYM360H336GPENF',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79573588509317278857e+09);
INSERT INTO "events" VALUES('sweep_01M8D365957HYM360H336GPENF',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79573588509317278857e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3659D1FYW7CHJCXX5JDQT',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79573588510101842877e+09);
INSERT INTO "events" VALUES('ftjob_01M8D3659D1FYW7CHJCXX5JDQT',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79573588510101842877e+09);
CREATE TABLE job_labels (
	job_id VARCHAR(40) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	value VARCHAR(512) NOT NULL, 
	PRIMARY KEY (job_id, "key"), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE jobs (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	idempotency_key VARCHAR(255), 
	fingerprint VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	status_reason TEXT, 
	attempt INTEGER NOT NULL, 
	last_seq INTEGER NOT NULL, 
	live JSON, 
	estimate JSON, 
	error JSON, 
	"plan" JSON, 
	ledger JSON, 
	created_at FLOAT NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, model VARCHAR(200) DEFAULT '' NOT NULL, search TEXT DEFAULT '' NOT NULL, trace VARCHAR(64), priority INTEGER DEFAULT '0' NOT NULL, queued_at FLOAT, queue_deadline FLOAT, want VARCHAR(16), requeue BOOLEAN DEFAULT 0 NOT NULL, faults INTEGER DEFAULT '0' NOT NULL, stuck INTEGER DEFAULT '0' NOT NULL, lost_step INTEGER, kind VARCHAR(8) DEFAULT 'job' NOT NULL, parent_id VARCHAR(40), trial_key VARCHAR(80), setting JSON, baseline VARCHAR(16), figures JSON, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('ftjob_01M8D3656RP38Y4J32HPFRRG9Q','user_first',NULL,'97fe135a338910fa11b982d02aedd6dc2b6299b2c2fd5844919998149f32a10c','{"name": "old and done", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "precision": {"compute": "auto", "wire": "fp32", "recompute": false}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 4, "window": 100, "placement": "auto", "worker_memory_bytes": null, "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','succeeded',NULL,1,5,NULL,NULL,NULL,NULL,NULL,1.79573588501612210277e+09,1.79573588503355693812e+09,1.79573588505421829226e+09,'d2ft_digits','ftjob_01m8d3656rp38y4j32hpfrrg9q
old and done
d2ft_digits
digits',NULL,0,1.79573588501612210277e+09,NULL,NULL,0,0,0,NULL,'job',NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('ftjob_01M8D3658FE21H7AANC7FQQGQV','user_first',NULL,'4544ac2442fcac71d7f7e8085c41d048e0afda89a4fc492b8e95f139cd76ade0','{"name": "old and running", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "precision": {"compute": "auto", "wire": "fp32", "recompute": false}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 5, "window": 100, "placement": "auto", "worker_memory_bytes": null, "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','running',NULL,1,5,NULL,NULL,NULL,NULL,NULL,1.79573588507094478606e+09,1.79573588507507777211e+09,NULL,'d2ft_digits','ftjob_01m8d3658fe21h7aanc7fqqgqv
old and running
d2ft_digits
digits',NULL,0,1.79573588507094478606e+09,NULL,NULL,0,0,0,NULL,'job',NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('sweep_01M8D365957HYM360H336GPENF','user_first',NULL,'c61de4b3b93010ece627ca8fc781dfb48a6cb74d78255e2da8bc1179abf5cbdf','{"name": "an old sweep", "job": {"name": null, "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "precision": {"compute": "auto", "wire": "fp32", "recompute": false}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": null, "window": 100, "placement": "auto", "worker_memory_bytes": null, "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}, "space": {"seed": {"values": [1, 2]}}, "search": {"type": "grid", "samples": 8, "seed": 0}, "objectives": {"accuracy": "max"}, "asha": null, "baselines": true, "at_once": 1, "metadata": {}}','queued',NULL,0,2,NULL,NULL,NULL,NULL,NULL,1.79573588509317278857e+09,NULL,NULL,'d2ft_digits','sweep_01m8d365957hym360h336gpenf
an old sweep
d2ft_digits
digits',NULL,0,1.79573588509317278857e+09,NULL,NULL,0,0,0,NULL,'sweep',NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('ftjob_01M8D3659D1FYW7CHJCXX5JDQT','user_first',NULL,'ad99c24a4d410cd46f18da01d1c98b3a57eb7d4d700a80e86719e411a62034b7','{"name": "old and waiting", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "precision": {"compute": "auto", "wire": "fp32", "recompute": false}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 6, "window": 100, "placement": "auto", "worker_memory_bytes": null, "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','queued',NULL,0,2,NULL,NULL,NULL,NULL,NULL,1.79573588510101842877e+09,NULL,NULL,'d2ft_digits','ftjob_01m8d3659d1fyw7chjcxx5jdqt
old and waiting
d2ft_digits
digits',NULL,0,1.79573588510101842877e+09,NULL,NULL,0,0,0,NULL,'job',NULL,NULL,NULL,NULL,NULL);
CREATE TABLE leases (
	name VARCHAR(40) NOT NULL, 
	holder VARCHAR(80) NOT NULL, 
	until FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE metrics (
	job_id VARCHAR(40) NOT NULL, 
	step INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	PRIMARY KEY (job_id, step), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE users (
	id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	max_queued INTEGER, 
	max_running INTEGER, 
	max_priority INTEGER DEFAULT '0' NOT NULL, 
	share FLOAT DEFAULT '1' NOT NULL, 
	usage_s FLOAT DEFAULT '0' NOT NULL, 
	usage_at FLOAT DEFAULT '0' NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "users" VALUES('user_first','admin','admin',NULL,NULL,100,1.0,6.95095062255859375e-02,1.79573588506836509699e+09,1.79573588496183967591e+09,NULL);
CREATE TABLE webhooks (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	url TEXT NOT NULL, 
	types JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id)
);
CREATE INDEX ix_jobs_created ON jobs (created_at, id);
CREATE INDEX ix_jobs_state ON jobs (state, created_at);
CREATE UNIQUE INDEX ux_jobs_idempotency ON jobs (owner, idempotency_key);
CREATE INDEX ix_attempts_state ON attempts (state);
CREATE UNIQUE INDEX ux_events_run ON events (job_id, attempt, run_seq);
CREATE INDEX ix_api_keys_user ON api_keys (user_id);
CREATE INDEX ix_jobs_owner ON jobs (owner, created_at, id);
CREATE INDEX ix_jobs_queue ON jobs (state, owner, priority, queued_at);
CREATE INDEX ix_job_labels ON job_labels ("key", value, job_id);
CREATE UNIQUE INDEX ux_datasets_name ON datasets (owner, name);
CREATE INDEX ix_webhooks_owner ON webhooks (owner);
CREATE INDEX ix_deliveries_due ON deliveries (state, next_at);
CREATE INDEX ix_deliveries_webhook ON deliveries (webhook_id);
CREATE INDEX ix_attempts_token ON attempts (token);
CREATE UNIQUE INDEX ux_jobs_trial ON jobs (parent_id, trial_key);
COMMIT;
